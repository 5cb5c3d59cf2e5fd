"""Processes that have torch and fastai imported, but not this package: each is forked from a server that has done so once, and
starts in milliseconds instead of five seconds. Where that cannot be (a GPU, no Linux), it is a new process as ever"""
import atexit, gc, multiprocessing, os, runpy, subprocess, sys, tempfile, types, warnings
from pathlib import Path

can_fork = sys.platform=='linux' and os.environ.get('FXCL_DEVICE', 'cpu')=='cpu'
server = multiprocessing.get_context('forkserver') if can_fork else None
if can_fork: server.set_forkserver_preload(['torch', 'torchvision', 'fastai.vision.all', 'fastai.distributed', 'matplotlib.pyplot', 'sklearn.datasets', 'nbdev.test'])

def _main(args):
    "What `python *args` does: options `-W`, then `-c` and a program, or a file"
    args = [*map(str, args)]
    while args[0]=='-W': warnings.simplefilter(args[1]); del args[:2]
    main = sys.modules['__main__'] = types.ModuleType('__main__')
    path = os.environ.get('PYTHONPATH', '').split(os.pathsep)
    first = '' if args[0]=='-c' else str(Path(args[0]).parent)
    sys.path[:] = [first, *filter(None, path), *sys.path]
    sys.argv = args[1:] if args[0]=='-c' else args
    if args[0]=='-c':
        sys.argv[0] = '-c'
        exec(compile(args[1], '<string>', 'exec'), vars(main))
    else: runpy.run_path(args[0], run_name='__main__')

def _child(f, args, env, cwd, out):
    for fd in (1, 2): os.dup2(os.open(f'{out}/{fd}', os.O_WRONLY|os.O_CREAT|os.O_TRUNC), fd)
    os.environ.clear(); os.environ.update(env)
    os.chdir(cwd)
    gc.freeze() # as in conftest.py
    try: f(*args)
    finally: atexit._run_exitfuncs() # multiprocessing leaves them out

class Started:
    "`f(*args)` in a process of its own"
    def __init__(self, f, *args, env=None, cwd=None):
        self.dir = tempfile.TemporaryDirectory()
        self.p = server.Process(target=_child, args=(f, args, dict(os.environ if env is None else env), str(cwd or Path.cwd()), self.dir.name))
        self.p.start()

    def wait(self, timeout=600):
        "As `subprocess.run` answers"
        self.p.join(timeout)
        ended = not self.p.is_alive()
        self.kill()
        if not ended: raise subprocess.TimeoutExpired(str(self.p), timeout)
        out,err = ((p.read_text(errors='replace') if (p := Path(self.dir.name)/str(i)).exists() else '') for i in (1, 2))
        return subprocess.CompletedProcess(self.p.name, self.p.exitcode, out, err)

    def kill(self):
        if self.p.is_alive(): self.p.kill()
        self.p.join()

class StartedPython:
    "`python *args`, as `Started`"
    def __init__(self, *args, env=None, cwd=None):
        self.p = subprocess.Popen([sys.executable, *map(str, args)], env=env, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    def wait(self, timeout=600):
        try: out,err = self.p.communicate(timeout=timeout)
        finally: self.kill()
        return subprocess.CompletedProcess(self.p.args, self.p.returncode, out, err)
    def kill(self): self.p.kill()

def start_python(*args, **kwargs): return Started(_main, args, **kwargs) if can_fork else StartedPython(*args, **kwargs)

def run_python(*args, timeout=600, **kwargs):
    "As `subprocess.run([sys.executable, *args], capture_output=True, text=True)`"
    return start_python(*args, **kwargs).wait(timeout)

def run_call(f, *args, timeout=600, **kwargs): return Started(f, *args, **kwargs).wait(timeout)
