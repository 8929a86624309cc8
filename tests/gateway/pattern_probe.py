"""The program of `test_linear_patterns`: tries the patterns of the packages that its command line names, and prints those that are slow.

What is tried comes out of each pattern itself: the way to each of its repeats, as a text that it matches, and behind it a run of what the
repeat takes, of the way once more, or of a character that many patterns take.
"""

import ast
import importlib
import inspect
import itertools
import pkgutil
import re
import signal
import sys
from re import _compiler, _parser
from re import _constants as op

CHARACTERS, MOST_S = 60_000, 1.0
RUNS = (
    " ",
    "\n",
    "\t",
    '"',
    "'",
    "a",
    "A",
    "1",
    "(",
    "[",
    "{",
    "<",
    "-",
    "*",
    "#",
    ".",
    ",",
    "a ",
    "1 ",
    "a.",
    "1-",
    "\\",
    "/",
    "=",
)


def patterns(value, depth=0):
    if isinstance(value, re.Pattern):
        yield value
    elif isinstance(value, dict | list | tuple | set | frozenset) and depth < 3:
        for one in value.values() if isinstance(value, dict) else value:
            yield from patterns(one, depth + 1)


def written(source):
    """Patterns that stand in functions: those of a call of `re`, with something in the place of what is put in."""
    functions = [one for one in ast.walk(ast.parse(source)) if isinstance(one, ast.FunctionDef | ast.AsyncFunctionDef)]
    for call in itertools.chain(*map(ast.walk, functions)):
        is_call = isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.args
        if not is_call or not (isinstance(call.func.value, ast.Name) and call.func.value.id == "re"):
            continue
        method, first = call.func.attr, call.args[0]
        text = getattr(first, "value", None)
        if isinstance(first, ast.JoinedStr):
            text = "".join(
                str(getattr(part, "value", "")) if isinstance(part, ast.Constant) else "x" for part in first.values
            )
        if isinstance(text, str) and method != "escape":
            flags = [
                one for one in (*call.args[1:], *(named.value for named in call.keywords)) if "re." in ast.unparse(one)
            ]
            try:
                pattern = re.compile(text, eval(ast.unparse(flags[0]), {"re": re}) if flags else 0)
            except Exception:
                # What was put in is more than a word.
                continue
            yield pattern, {method} if method in ("match", "fullmatch") else {"findall"}


def patterns_of(module):
    source = inspect.getsource(module)
    classes = [one for one in vars(module).values() if isinstance(one, type) and one.__module__ == module.__name__]
    for name, value in itertools.chain(*(vars(place).items() for place in (module, *classes))):
        for pattern in patterns(value):
            used = set(re.findall(rf"\b{name}\.(match|fullmatch)\b", source))
            is_sought = not used or re.search(rf"\b{name}\.(search|find|sub|split)", source)
            yield pattern, name, {"findall", *used} if is_sought else used
    for pattern, tried in written(source):
        yield pattern, repr(pattern.pattern), tried


found = {}
for package in sys.argv[1:]:
    root = importlib.import_module(package)
    for info in pkgutil.walk_packages(root.__path__, package + "."):
        # The others read what whoever runs the gateway wrote.
        if info.name.endswith("__main__") or info.name.startswith(
            ("anabranch.gateway.config", "anabranch.routers.data")
        ):
            continue
        try:
            module = importlib.import_module(info.name)
        except ImportError:
            # It needs an extra that is not here.
            continue
        for pattern, name, tried in patterns_of(module):
            found.setdefault(pattern, (f"{info.name}.{name}", set()))[1].update(tried)


def late(*_):
    raise TimeoutError


ALPHABET = "".join(
    dict.fromkeys(
        "".join(RUNS)
        + "bxyzBXYZ"
        + "".join(map(chr, range(32, 127)))
        + "\u3042\uac00\u4e00\u0414\u0627\u05d0\u0939\u0e01\u03b1\u2212"
    )
)
REPEATS = (op.MAX_REPEAT, op.MIN_REPEAT, op.POSSESSIVE_REPEAT)


def inner(node):
    """What a node holds, of which one comes."""
    kind, value = node
    if kind in REPEATS:
        return [value[2]]
    return {op.SUBPATTERN: lambda: [value[3]], op.BRANCH: lambda: value[1], op.ATOMIC_GROUP: lambda: [value]}.get(
        kind, list
    )()


def witness(nodes, state):
    """A text that a sequence matches, as far as it has no conditions."""
    made = ""
    for node in nodes:
        held = inner(node)
        if node[0] in REPEATS:
            made += witness(held[0], state) * min(node[1][0], 50)
        elif held:
            made += witness(held[0], state)
        elif node[0] in (op.LITERAL, op.NOT_LITERAL, op.ANY, op.IN):
            one = _compiler.compile(_parser.SubPattern(state, [node]))
            made += next(
                (sign for sign in ALPHABET if one.fullmatch(sign)), chr(node[1]) if node[0] is op.LITERAL else ""
            )
    return made


def ways(nodes, state, before=""):
    """To each repeat: the text before it, and what it takes once."""
    for node in nodes:
        for held in inner(node):
            if node[0] in REPEATS:
                yield before, witness(held, state)
            yield from ways(held, state, before)
        before += witness([node], state)


def tries(pattern):
    is_bytes = isinstance(pattern.pattern, bytes)
    source = pattern.pattern.decode() if is_bytes else pattern.pattern
    tree = _parser.parse(source, pattern.flags & ~re.DEBUG)
    # What a run may follow: nothing, words that the pattern itself begins with, and the way to one of its repeats.
    texts = {(word, run) for word in ["", *re.findall(r"[A-Za-z#]{3,}", source)[:3]] for run in RUNS}
    for before, body in ways(tree, tree.state):
        texts |= {(before, run) for run in (*RUNS, body, before, before + body)}
    for word, run in sorted(texts):
        if run:
            text = word + run * (CHARACTERS // len(run)) + "\x00"
            yield (word, run), text.encode() if is_bytes else text


def slow_at(pattern, methods):
    """What a pattern is slow on, and by which method; None where it is not."""
    for how, text in tries(pattern):
        for method in methods:
            try:
                signal.setitimer(signal.ITIMER_VIRTUAL, MOST_S)
                getattr(pattern, method)(text)
            except TimeoutError:
                return how, method
            finally:
                signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    return None


signal.signal(signal.SIGVTALRM, late)
for pattern, (name, methods) in found.items():
    how = slow_at(pattern, methods)
    if how:
        print("SLOW", name, how, flush=True)
print("TRIED", len(found))
