"""How the site shows a function or class: a short signature, and a table of its parameters.

`renderer` in pyproject.toml names it for nbdev's `show_doc`, which can import nothing but what is installed: so it is here. It is no part of the package's API."""
import re
from dataclasses import fields, is_dataclass
from inspect import Parameter, formatannotation, isclass
from types import FunctionType, NoneType, UnionType
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
    if anno in (Parameter.empty, object, None, NoneType, FunctionType): return '' # the last two are the types of defaults
    alternatives = get_args(anno) if get_origin(anno) in (Union, UnionType) else [anno]
    names = [f'`{type_name(o)}`' for o in alternatives if not (o is NoneType and default is None)]
    return ' or '.join(o for o in (', '.join(names[:-1]), names[-1]) if o)

def cell(text):
    "`text` in one cell of a table: on one line, and outside code without a bar or a quotation mark that would be curled"
    return re.sub(r'(`[^`]*`)|([|\'"])', lambda m: m[1] or '\\'+m[2], ' '.join((text or '').split()))

class SignatureAndTable(MarkdownRenderer):
    "A signature without types; types, defaults and descriptions in a table, if anything is described"
    def __init__(self, sym, **kwargs):
        super().__init__(sym, **kwargs)
        self.is_property = isinstance(sym, property)

    def default(self, name):
        "The default of parameter `name` as one would write it; empty if it has none"
        value = self.dm.dm[name].default
        if value is Parameter.empty: return ''
        made = [f.default_factory for f in fields(self.sym) if f.name==name and callable(f.default_factory)] if is_dataclass(self.sym) else []
        if made: return f'{get_name(made[0])}()'
        text = getattr(value, '__name__', repr(value))
        return '...' if text.startswith('<') else text if len(text)<=40 else f'{type(value).__name__}(...)'

    def signature(self, params):
        "On one line, or a line for each parameter"
        name,items,star = get_name(self.sym),[],False
        for o,p in params.items():
            if p.kind==Parameter.KEYWORD_ONLY and not star: items.append('*')
            star = star or p.kind in (Parameter.VAR_POSITIONAL, Parameter.KEYWORD_ONLY)
            items.append(stars.get(p.kind, '') + o + (f'={d}' if (d := self.default(o)) else ''))
        line = f"{name}({', '.join(items)})"
        return name if self.is_property else line if len(line)<=60 else '\n'.join([f'{name}(', *(f'    {o},' for o in items), ')'])

    def table(self, params, returned):
        "A row for each parameter, and one for what is returned; empty if nothing is described"
        if not any(o.docment for o in [*params.values(), returned]): return ''
        rows = []
        for o,p in params.items():
            name,d = (stars.get(p.kind, '') + o).replace('*', r'\*'),self.default(o)
            says = [types_of(p.anno, p.default), f'default `{d}`' if d else '']
            rows.append((f'**{name}**', ', '.join(o for o in says if o), p.docment))
        if types_of(returned.anno): rows.append(('*Returns*', types_of(returned.anno), returned.docment))
        lines = [f"| {name} {f'[{cell(says)}]{{.type}} ' if says else ''}| {cell(doc)} |" for name,says,doc in rows]
        return '\n'.join(['::: {.params}', '', '| Parameter | Description |', '|:-----|:----------|', *lines, '', ':::', ''])

    def _repr_markdown_(self):
        if self.sig:
            params = dict(self.dm.dm)
            returned = params.pop('return')
            code,table = self.signature(params),self.table(params, returned)
        else: code,table = f"class {self.nm}({', '.join(map(get_name, self.sym.__bases__))})" if isclass(self.sym) else self.nm,''
        return '\n\n'.join(o for o in (f'```{{.python .signature}}\n{code}\n```', self.docs, table) if o)

class Renderer(BasicMarkdownRenderer, SignatureAndTable):
    "nbdev's heading and link to the source, then the above"
    def __init__(self, sym, **kwargs):
        super().__init__(sym, **kwargs)
        self.fn = self.fn.removeprefix(f'{getattr(self.sym, "__module__", "")}.') # nbdev knows the line by this name
