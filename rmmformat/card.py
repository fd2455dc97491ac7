"""A model card for a file: what a hub shows beside it."""

from __future__ import annotations

import json
import re
import shlex

from rmmformat._version import __version__
from rmmformat.collection import Collection
from rmmformat.errors import OptionError
from rmmformat.inspect import FileInfo, TaskInfo, file_info
from rmmformat.text import percent, printable, size

__all__ = ["MAX_ROWS", "model_card"]

#: Most tasks in the card's table: those with the largest errors, where there are more.
MAX_ROWS = 100

_HUB_ID = re.compile(r"(?:[\w][\w.-]{0,95}/)?[\w][\w.-]{0,95}", re.ASCII)


def model_card(
    collection: Collection, *, repo: str | None = None, licence: str | None = None
) -> str:
    """Write the model card of a file: Markdown behind a YAML head, as the hub wants it.

    Parameters
    ----------
    collection
        An open file; its index alone is read.
    repo
        Id of the repository that the file will lie in (``"me/skills"``): the snippets then open it
        there.
    licence
        The hub's word for a licence, such as ``"apache-2.0"``.

    Returns
    -------
    str
        Names of tasks and targets are data: nothing in them becomes markup.

    Raises
    ------
    OptionError
        `repo` is not an id of the form OWNER/NAME, or `licence` not one word.
    """
    if repo is not None and not (_HUB_ID.fullmatch(repo) and "/" in repo):
        raise OptionError(f"a repository is OWNER/NAME, got {repo!r}")
    if licence is not None and not re.fullmatch(r"[A-Za-z0-9.+-]{1,60}", licence):
        raise OptionError(f"a licence is one word such as apache-2.0, got {licence!r}")
    info = file_info(collection)
    file = _file_name(info.path)
    base = _code(info.base_model) if info.base_model else "a base model that is not recorded"
    n_tasks = "One task" if len(info.tasks) == 1 else f"{len(info.tasks)} tasks"
    parts = [
        _head(info, licence),
        f"# {_plain(file)}",
        f"{n_tasks}, low-rank fine-tunes of {base}, in one "
        "[`.rmm`](https://arxiv.org/abs/2510.14163) file, checked and quick to switch.",
        _facts(info),
        "## Use",
        _usage(info, file, repo),
        "## Tasks",
        "Errors are relative Frobenius errors of each task's deltas against the originals, over "
        "its targets, measured on the file when it was written. They are not losses of accuracy.",
        _table(info),
    ]
    if info.tasks and len(info.tasks) > MAX_ROWS:
        parts.append(f"The {MAX_ROWS} of {len(info.tasks)} tasks with the largest errors.")
    parts += ["## How it was made", _made(info)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _file_name(path: str) -> str:
    return printable(path.replace("\\", "/").rsplit("/", 1)[-1]) or "collection.rmm"


def _head(info: FileInfo, licence: str | None) -> str:
    lines = ["---", "library_name: rmmformat"]
    if licence is not None:
        lines.append(f"license: {json.dumps(licence)}")
    if _HUB_ID.fullmatch(info.base_model):  # a path of someone's disk is nothing that a hub knows
        lines += [f"base_model: {json.dumps(info.base_model)}", "base_model_relation: adapter"]
    lines += ["tags:", "- rmm", "- lora", "- adapter", "- model-merging", "---"]
    return "\n".join(lines)


def _facts(info: FileInfo) -> str:
    lines = [f"- file: {size(info.file_bytes)}"]
    if info.fraction is not None and info.original_bytes:
        lines.append(
            f"- factors: {size(info.factor_bytes)}, {percent(info.fraction)} of the originals' "
            f"{size(info.original_bytes)}; {size(info.shared_bytes)} of it shared by several tasks"
        )
    measured = [task for task in info.tasks if task.max_error is not None]
    if measured:
        worst = max(measured, key=lambda task: task.max_error or 0.0)
        means = [task.mean_error or 0.0 for task in measured]
        lines.append(
            f"- error of the deltas: mean {percent(sum(means) / len(means))}, largest "
            f"{percent(worst.max_error)} ({_code(worst.name)})"
        )
    if info.private_bytes:
        lines.append(f"- private tensors (heads and the like), exact: {size(info.private_bytes)}")
    lines.append(f"- targets: {len(info.targets)}")
    return "\n".join(lines)


def _usage(info: FileInfo, file: str, repo: str | None) -> str:
    if not info.tasks:
        return "The file has no task yet."
    task = info.tasks[0].name
    where = file if repo is None else f"hf://{repo}/{file}"
    extra = "rmmformat" if repo is None else "'rmmformat[remote]' huggingface_hub"
    python = "\n".join([
        "import rmmformat as rmm",
        "",
        f"with rmm.open({json.dumps(where, ensure_ascii=False)}) as collection:",
        "    print(collection.tasks)",
        f"    task = collection.load({_literal(task)})",
        "    for target, factors in task.items():",
        "        factors.A, factors.B, factors.scale  # the delta is scale * B @ A",
    ])  # fmt: skip
    shell = [f"pip install {extra}"]
    if repo is not None:
        shell.append(f"hf download {repo} {shlex.quote(file)} --local-dir .")
    if printable(task) == task:
        shell.append(f"rmm export {shlex.quote(file)} {shlex.quote(task)} --to peft -o adapter/")
    return f"{_block(python, 'python')}\n\n{_block(chr(10).join(shell), 'bash')}"


def _literal(text: str) -> str:
    """A string as Python reads it back, in visible characters."""
    return json.dumps(text) if printable(text) != text else json.dumps(text, ensure_ascii=False)


def _table(info: FileInfo) -> str:
    lines = ["| task | targets | rank | original | own bytes | mean error | largest error |",
             "| --- | --- | --- | --- | --- | --- | --- |"]  # fmt: skip
    worst = sorted(info.tasks, key=lambda task: (-(task.max_error or 0.0), task.name))[:MAX_ROWS]
    lines += [_row(task) for task in sorted(worst, key=lambda task: task.name)]
    return "\n".join(lines)


def _row(task: TaskInfo) -> str:
    cells = [
        _code(task.name).replace("|", "\\|"),
        str(task.n_targets),
        "/".join(map(str, task.ranks)),
        "-" if task.original_bytes is None else size(task.original_bytes),
        size(task.own_bytes),
        percent(task.mean_error),
        percent(task.max_error),
    ]
    return f"| {' | '.join(cells)} |"


def _made(info: FileInfo) -> str:
    method = {key: value for key, value in info.method.items() if value is not None}
    name = method.pop("name", None)
    how = "a method that is not recorded" if name is None else f"method {_code(str(name))}"
    if method:
        how += f" with {_code(', '.join(f'{key} {value}' for key, value in method.items()))}"
    by = _code(info.producer) if info.producer else "an unnamed program"
    return (
        f"Written by {by} with {how}; format {info.version}. This card is from `rmm card`, "
        f"rmmformat {__version__}. `rmm validate` checks every byte of the file; `rmm info` shows "
        "errors by task and target."
    )


def _plain(text: str) -> str:
    """Text in which no character is markup."""
    return re.sub(r"([\\`*_{}\[\]<>()#+!|~&-])", r"\\\1", printable(text))


def _code(text: str) -> str:
    """Text as a code span, whatever it holds."""
    text = printable(text)
    ticks = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    pad = " " if text.startswith("`") or text.endswith("`") or not text.strip() else ""
    return f"{ticks}{pad}{text or ' '}{pad}{ticks}"


def _block(text: str, language: str) -> str:
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text}\n{fence}"
