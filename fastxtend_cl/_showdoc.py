"""How the site shows a function or class: a short signature, and a table of its parameters.

`renderer` in pyproject.toml names it for nbdev's `show_doc`, which can import nothing but what is installed: so it is here. It is no part of the package's API."""
import re
from dataclasses import fields, is_dataclass
from inspect import Parameter, formatannotation, isclass
from types import NoneType, UnionType
from typing import Union, get_args, get_origin
from fastcore.docments import MarkdownRenderer, get_name
from nbdev.showdoc import BasicMarkdownRenderer

stars = {Parameter.VAR_POSITIONAL: '*', Parameter.VAR_KEYWORD: '**'}

def type_name(t):
    "Of a class with a long path its name alone; torch's modules as everybody writes them"
    name = re.sub(r'(?:\w+\.){2,}(?=\w)', '', formatannotation(t).replace('torch.nn.modules.module.', 'nn.')).strip("'")
    return 'None' if name=='NoneType' else name

def types_of(anno, default=Parameter.empty):
    "The alternatives of annotation `anno` in backticks, which nbdev makes links of; a None that is the default goes without saying"
    if anno in (Parameter.empty, object, None, NoneType): return ''
    alternatives = get_args(anno) if get_origin(anno) in (Union, UnionType) else [anno]
    names = [f'`{type_name(o)}`' for o in alternatives if not (o is NoneType and default is None)]
    return ' or '.join(o for o in (', '.join(names[:-1]), names[-1]) if o)

def cell(text):
    "`text` in one cell of a table: on one line, and without a bar outside code"
    return re.sub(r'(`[^`]*`)|\|', lambda m: m[1] or r'\|', ' '.join((text or '').split()))

class SignatureAndTable(MarkdownRenderer):
    "A signature without types; types, defaults and descriptions in a table, if anything is described"
    def __init__(self, sym, **kwargs):
        super().__init__(sym, **kwargs)
        self.is_property = isinstance(sym, property)

    def default(self, p):
        "The default of parameter `p` as one would write it; empty if it has none"
        if p.default is Parameter.empty: return ''
        made = [f.default_factory for f in fields(self.sym) if f.name==p.name and callable(f.default_factory)] if is_dataclass(self.sym) else []
        if made: return f'{get_name(made[0])}()'
        text = getattr(p.default, '__name__', repr(p.default))
        return '...' if text.startswith('<') else text if len(text)<=40 else f'{type(p.default).__name__}(...)'

    def signature(self, params):
        "On one line, or a line for each parameter"
        name,items,star = get_name(self.sym),[],False
        for p in params:
            if p.kind==Parameter.KEYWORD_ONLY and not star: items.append('*')
            star = star or p.kind in (Parameter.VAR_POSITIONAL, Parameter.KEYWORD_ONLY)
            items.append(stars.get(p.kind, '') + p.name + (f'={d}' if (d := self.default(p)) else ''))
        line = f"{name}({', '.join(items)})"
        return name if self.is_property else line if len(line)<=60 else '\n'.join([f'{name}(', *(f'    {o},' for o in items), ')'])

    def table(self, params):
        "A row for each parameter, and one for what is returned; empty if nothing is described"
        described,rows = self.dm.dm,[]
        if not any(o.docment for o in described.values()): return ''
        for p in params:
            name,d = (stars.get(p.kind, '') + p.name).replace('*', r'\*'),self.default(p)
            says = [types_of(described[p.name].anno, p.default), f'default `{d}`' if d else '']
            rows.append((f'**{name}**', ', '.join(o for o in says if o), described[p.name].docment))
        returned = described.get('return')
        if returned and types_of(returned.anno): rows.append(('*Returns*', types_of(returned.anno), returned.docment))
        lines = [f"| {name} {f'[{cell(says)}]{{.type}} ' if says else ''}| {cell(doc)} |" for name,says,doc in rows]
        return '\n'.join(['::: {.params}', '', '| Parameter | Description |', '|:-----|:----------|', *lines, '', ':::', ''])

    def _repr_markdown_(self):
        if self.sig:
            params = [p for p in self.sig.parameters.values() if p.name!='self']
            code,table = self.signature(params),self.table(params)
        else: code,table = f"class {self.nm}({', '.join(map(get_name, self.sym.__bases__))})" if isclass(self.sym) else self.nm,''
        return '\n\n'.join(o for o in (f'```{{.python .signature}}\n{code}\n```', self.docs, table) if o)

class Renderer(BasicMarkdownRenderer, SignatureAndTable):
    "nbdev's heading and link to the source, then the above"
