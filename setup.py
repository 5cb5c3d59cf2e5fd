"Metadata comes from settings.ini; pyproject.toml names the build backend and what nbdev 3 reads"
from configparser import ConfigParser
from pathlib import Path
from setuptools import setup, find_packages

here = Path(__file__).parent
ini = ConfigParser(delimiters=['='])
ini.read(here/'settings.ini', encoding='utf-8')
cfg = ini['DEFAULT']
lib = cfg['lib_name']
status = {'1':'Planning','2':'Pre-Alpha','3':'Alpha','4':'Beta','5':'Production/Stable','6':'Mature','7':'Inactive'}

setup(
    version=cfg['version'],
    long_description=(here/'README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown',
    author=cfg['author'],
    license_expression=cfg['license'],
    keywords=cfg['keywords'],
    python_requires='>='+cfg['min_python'],
    install_requires=cfg['requirements'].split(),
    extras_require={'dev': cfg['dev_requirements'].split()},
    packages=find_packages(include=[lib, lib+'.*']),
    include_package_data=True,
    classifiers=[
        f"Development Status :: {cfg['status']} - {status[cfg['status']]}",
        f"Intended Audience :: {cfg['audience']}",
        'Programming Language :: Python :: 3',
        'Programming Language :: Python :: 3 :: Only',
        *[f'Programming Language :: Python :: 3.{minor}' for minor in range(int(cfg['min_python'].split('.')[1]), 14)], # those that .github/workflows/test.yaml tests
    ],
    entry_points={
        'console_scripts': cfg.get('console_scripts', '').split(),
        'nbdev': [f'{lib}={lib}._modidx:d'],
    },
)
