"""
The documentation says what the code does. Run as a program, this file writes the tables of parameters in
the pages of docs/algorithms from the declarations: ``python tests/test_docs.py``.
"""

import ast
import importlib
import inspect
import re
import shlex
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from sb3_contrib import TRPO
from stable_baselines3 import A2C, PPO

import sb3_pgplus
from sb3_pgplus import A2CPlus, PPOPlus, TRPOPlus, presets
from sb3_pgplus.hparams import PPOHparams

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
CHANGELOG = ROOT / "CHANGELOG.md"
PPO_PAGE = ROOT / "docs" / "algorithms" / "ppo.md"
#: Page → our class, the stock one it stands for, and the preset that reproduces that one.
ALGORITHM_PAGES: dict[Path, tuple[Any, Any, dict[str, Any]]] = {
    PPO_PAGE: (PPOPlus, PPO, presets.SB3_PPO),
    PPO_PAGE.with_name("a2c.md"): (A2CPlus, A2C, presets.SB3_A2C),
    PPO_PAGE.with_name("trpo.md"): (TRPOPlus, TRPO, presets.SB3_TRPO),
}
PAGES = sorted([README, CHANGELOG, ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])
#: How a documented program is shortened before it is run; everything else stays as it is.
SHORTER = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\.learn\((total_timesteps=)?[\d_.e]+", r".learn(\g<1>64"),
        (r"range\(\d+\)", "range(2)"),
        (r"n_eval_episodes=\d+", "n_eval_episodes=1"),
        (r"HalfCheetah-v5", "Pendulum-v1"),
        (r"n_steps=\d+", "n_steps=16"),
        (r"schedule_timesteps=", "n_steps=16, schedule_timesteps="),
        # Rollouts of 2048 steps, for one epoch instead of ten; SB3's model beside ours gets the same.
        (r"(?<!\{)\*\*presets\.SB3_PPO", "**{**presets.SB3_PPO, 'n_epochs': 1}"),
        (r" PPO\((.*), seed=0", r" PPO(\1, n_epochs=1, seed=0"),
    )
)
UNSET = object()


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


# --- Python in Markdown -----------------------------------------------------------------------------------------------


def code_blocks(path: Path, language: str) -> list[tuple[int, str, str]]:
    """Line number, rest of the opening fence, content."""
    text = path.read_text(encoding="utf-8")
    found = re.finditer(rf"^```{language}\b(.*)\n((?:.*\n)*?)```$", text, re.MULTILINE)
    return [(text[: match.start()].count("\n") + 1, match[1].strip(), match[2]) for match in found]


def python_blocks() -> Iterator[Any]:
    for path in PAGES:
        for line, flag, code in code_blocks(path, "python"):
            yield pytest.param(flag, code, id=f"{relative(path)}:{line}")


def shortened(code: str) -> str:
    for pattern, replacement in SHORTER:
        code = pattern.sub(replacement, code)
    return code


@pytest.mark.parametrize(("flag", "code"), list(python_blocks()))
def test_python_in_the_documentation_runs(
    flag: str, code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compile(code, "documentation", "exec")
    if flag == "notest":  # SB3's side of a comparison, without its imports
        return
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        # A rollout that was shortened has a minibatch that is not full.
        warnings.simplefilter("ignore")
        exec(compile(shortened(code), "documentation", "exec"), {"__name__": "documentation"})


def test_the_first_program_of_the_readme_has_ten_lines() -> None:
    _, _, code = code_blocks(README, "python")[0]
    assert len([line for line in code.splitlines() if line]) <= 10
    assert "from sb3_pgplus import PPOPlus" in code


# --- tables -----------------------------------------------------------------------------------------------------------


def tables(path: Path) -> Iterator[tuple[list[str], list[list[str]]]]:
    """Header and rows of every table, cells stripped."""
    for match in re.finditer(r"^\|.*\n\|[-:| ]+\|\n(?:\|.*\n)+", path.read_text(encoding="utf-8"), re.MULTILINE):
        header, _, *rows = (
            [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in match[0].splitlines()
        )
        yield header, rows


def rows_of(path: Path, *first_columns: str) -> list[list[str]]:
    """Rows of all tables whose header begins so."""
    return [
        row for header, rows in tables(path) if tuple(header[: len(first_columns)]) == first_columns for row in rows
    ]


def literal(cell: str) -> Any:
    """The value of the code in a cell: **`"lin_3e-4"`** → "lin_3e-4"."""
    return ast.literal_eval(cell.strip("*").strip("`"))


def defaults_of(cls: Any) -> dict[str, Any]:
    parameters = inspect.signature(cls).parameters.values()
    return {p.name: UNSET if p.default is p.empty else p.default for p in parameters}


def sb3_defaults() -> dict[str, Any]:
    return defaults_of(PPO)


def our_defaults() -> dict[str, Any]:
    return defaults_of(PPOPlus)


SB3_TABLE = ("SB3 PPO argument → PPOPlus argument", "SB3's default", "Default here")


def documented_default(cell: str) -> Any:
    return UNSET if cell == "required" else literal(cell)


def test_the_readme_lists_the_arguments_of_sb3_in_its_order_with_both_defaults() -> None:
    rows = rows_of(README, *SB3_TABLE)
    names = [re.fullmatch(r"`(\w+)` → same", row[0]) for row in rows]
    assert [name and name[1] for name in names] == list(sb3_defaults())
    ours = our_defaults()
    for (name, theirs), row in zip(sb3_defaults().items(), rows, strict=True):
        assert documented_default(row[1]) == theirs, f"SB3's default of {name}"
        assert documented_default(row[2]) == ours[name], f"our default of {name}"


def test_the_readme_prints_bold_exactly_the_defaults_that_differ_from_sb3() -> None:
    for row in rows_of(README, *SB3_TABLE):
        assert row[2].startswith("**") == (row[1] != row[2]), row[0]


def test_the_readme_lists_the_new_arguments_with_their_defaults() -> None:
    documented = {row[0].strip("`"): literal(row[1]) for row in rows_of(README, "Argument", "Default", "What it does")}
    new = {name: default for name, default in our_defaults().items() if name not in sb3_defaults()}
    assert documented == new


def test_every_hyperparameter_is_in_one_of_the_tables_of_the_readme() -> None:
    sb3 = {row[0].split("`")[1] for row in rows_of(README, *SB3_TABLE)}
    new = {row[0].strip("`") for row in rows_of(README, "Argument", "Default", "What it does")}
    assert not sb3 & new
    assert set(PPOHparams.names()) <= sb3 | new
    assert sb3 | new == set(our_defaults())


def settings_in(cell: str) -> list[tuple[str, Any]]:
    """``name=value`` in backticks."""
    return [(name, ast.literal_eval(value)) for name, value in re.findall(r"`(\w+)=([^`]+)`", cell)]


TRICKS = rows_of(README, "#", "Trick", "Default")


def test_the_table_of_tricks_shows_the_defaults() -> None:
    assert [int(row[0]) for row in TRICKS] == list(range(1, len(TRICKS) + 1))
    for row in TRICKS:
        assert settings_in(row[2]), row
        for name, value in settings_in(row[2]):
            assert value == PPOHparams.defaults()[name], row


@pytest.mark.parametrize("row", TRICKS, ids=lambda row: f"trick {row[0]}")
def test_the_table_of_tricks_shows_how_to_switch_each_one(row: list[str]) -> None:
    alternatives = settings_in(row[3])
    assert alternatives
    for name, value in alternatives:
        assert value != PPOHparams.defaults()[name]
        needed = {"kl_coef": 1.0} if name == "adaptive_kl_target" else {}
        PPOHparams.resolve({**PPOHparams.defaults(), **needed, name: value})


def test_the_readme_names_what_can_be_a_schedule() -> None:
    section = README.read_text(encoding="utf-8").partition("## Schedules")[2].partition("|")[0]
    assert set(re.findall(r"`(\w+)`", section)) == set(PPOHparams.scheduled_names())


def test_the_values_in_the_table_of_schedules_are_schedules() -> None:
    for row in rows_of(README, "Value", "Meaning"):
        for value in re.findall(r"`([^`]+)`", row[0]):
            PPOHparams.resolve({**PPOHparams.defaults(), "learning_rate": ast.literal_eval(value)})


def test_the_readme_lists_the_presets() -> None:
    public = {f"presets.{name}" for name in vars(presets) if name.isupper() and not name.startswith("_")}
    assert {row[0].strip("`") for row in rows_of(README, "Preset", "What it is")} == public


def test_the_lecture_preset_is_the_defaults_but_for_lambda_and_the_two_beyond_the_lecture() -> None:
    defaults = PPOHparams.defaults()
    different = {name: value for name, value in presets.LECTURE.items() if value != defaults[name]}
    written_out = {"ortho_init": True, "activation_fn": "tanh", "adam_eps": 1e-5}  # None: the policy's, the same
    assert different == {**written_out, "gae_lambda": 0.95, "log_std_init": None, "recompute_advantages": False}


def test_both_pages_show_the_same_table_of_spaces() -> None:
    assert rows_of(README, "Space", "Action", "Observation") == rows_of(PPO_PAGE, "Space", "Action", "Observation")


@pytest.mark.parametrize("page", list(ALGORITHM_PAGES)[1:], ids=relative)
def test_the_pages_of_a2c_and_trpo_list_where_arguments_of_the_stock_class_differ(page: Path) -> None:
    ours, stock, _ = ALGORITHM_PAGES[page]
    theirs, shipped = defaults_of(stock), defaults_of(ours)
    header = "sb3-contrib" if stock is TRPO else "SB3"
    documented = {row[0].strip("`"): row for row in rows_of(page, "Argument", header, ours.__name__)}
    assert set(documented) == {name for name in theirs if theirs[name] != shipped[name]}
    for name, row in documented.items():
        assert (literal(row[1]), literal(row[2])) == (theirs[name], shipped[name])


@pytest.mark.parametrize("page", ALGORITHM_PAGES, ids=relative)
def test_the_constructor_takes_the_arguments_of_the_stock_class_in_its_order(page: Path) -> None:
    ours, stock, _ = ALGORITHM_PAGES[page]
    theirs = list(defaults_of(stock))
    assert list(defaults_of(ours))[: len(theirs)] == theirs


@pytest.mark.parametrize("page", ALGORITHM_PAGES, ids=relative)
def test_the_changelog_lists_where_defaults_differ(page: Path) -> None:
    cls, stock, preset = ALGORITHM_PAGES[page]
    ours, theirs = defaults_of(cls), defaults_of(stock)
    rows = rows_of(CHANGELOG, "Argument", "Stock", cls.__name__)
    assert {row[0].strip("`") for row in rows} >= {name for name in theirs if theirs[name] != ours[name]}
    for row in rows:
        name = row[0].strip("`")
        assert literal(row[2]) == ours[name]
        assert literal(row[1].split(" (")[0]) == theirs.get(name, preset.get(name))


# --- the generated table ----------------------------------------------------------------------------------------------

BEGIN, END = "<!-- parameters: begin -->\n", "<!-- parameters: end -->"


def parameter_table(page: Path) -> str:
    lines = ["| Parameter | Default | Allowed | Meaning |", "|---|---|---|---|"]
    hparams = ALGORITHM_PAGES[page][0].hparams_class
    for name, default in hparams.defaults().items():
        spec = hparams.spec(name)
        shown = f'"{default}"' if isinstance(default, str) else repr(default)
        lines.append(f"| `{name}` | `{shown}` | {spec.allowed()} | {spec.doc} |")
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("page", ALGORITHM_PAGES, ids=relative)
def test_the_table_of_parameters_is_that_of_the_declarations(page: Path) -> None:
    shown = page.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0]
    assert shown == parameter_table(page), "write it anew: python tests/test_docs.py"


# --- names, links, commands -------------------------------------------------------------------------------------------


def slug(heading: str) -> str:
    """GitHub's anchor of a heading."""
    text = re.sub(r"[`*]", "", heading).strip().lower()
    return re.sub(r"[^\w\- ]", "", text).replace(" ", "-")


def without_code(text: str) -> str:
    return re.sub(r"^```(?:.*\n)*?```$", "", text, flags=re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_relative_links_resolve(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(page.read_text(encoding="utf-8"))):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        linked = (page.parent / file).resolve() if file else page
        assert linked.exists(), f"{target} is not there"
        assert linked.is_relative_to(ROOT)
        if anchor:
            headings = re.findall(r"^#+ (.*)$", without_code(linked.read_text(encoding="utf-8")), re.MULTILINE)
            assert anchor in map(slug, headings), f"{target}: no such heading"


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_names_of_the_package_in_the_text_exist(page: Path) -> None:
    for name in sorted(set(re.findall(r"`(sb3_pgplus(?:\.\w+)+)`", page.read_text(encoding="utf-8")))):
        found: Any = sb3_pgplus
        path = "sb3_pgplus"
        for part in name.split(".")[1:]:
            path = f"{path}.{part}"
            try:
                found = getattr(found, part)
            except AttributeError:
                found = importlib.import_module(path)


def shell_commands() -> Iterator[list[str]]:
    for page in PAGES:
        for _, _, block in code_blocks(page, "bash"):
            yield from filter(None, (shlex.split(line, comments=True) for line in block.splitlines()))


def test_the_commands_of_the_documentation_exist_with_their_options() -> None:
    from sb3_pgplus.cli import app

    group: Any = typer.main.get_command(app)
    for program, *arguments in shell_commands():
        if program != "sb3-pgplus":
            continue
        command = group.commands[arguments[0]]
        options = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
        used = {argument for argument in arguments[1:] if argument.startswith("-")}
        assert used <= options, f"{arguments[0]} has no {used - options}"


def test_the_make_targets_of_the_documentation_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    used = set(re.findall(r"^make ([a-z-]+)", text, re.MULTILINE)) | set(re.findall(r"`make ([a-z-]+)", text))
    assert used <= targets


def test_the_readme_lists_the_files_of_a_run_folder() -> None:
    from sb3_pgplus.run_folder import RunFolder

    properties = [name for name, value in vars(RunFolder).items() if isinstance(value, property)]
    files = {getattr(RunFolder(Path("run")), name).name for name in properties}
    assert {row[0].strip("`") for row in rows_of(README, "File", "Content")} == files | {"video.mp4"}


def test_the_changelog_has_the_current_version_and_the_headings_of_sb3() -> None:
    text = CHANGELOG.read_text(encoding="utf-8")
    newest = re.findall(r"^## (.*)$", text, re.MULTILINE)[0]
    assert sb3_pgplus.__version__ in newest
    entry = re.split(r"^## ", text, flags=re.MULTILINE)[1]
    headings = re.findall(r"^### (.*)$", entry, re.MULTILINE)
    assert headings == ["Breaking Changes", "New Features", "Bug Fixes", "Changed Defaults", "Documentation"]


@pytest.mark.parametrize("path", sorted((ROOT / "sb3_pgplus").rglob("*.py")), ids=relative)
def test_public_classes_and_functions_have_docstrings(path: Path) -> None:
    module = ast.parse(path.read_text(encoding="utf-8"))
    kinds = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    public = [node for node in module.body if isinstance(node, kinds) and not node.name.startswith("_")]
    assert not [node.name for node in public if not ast.get_docstring(node)]
    assert ast.get_docstring(module) is not None or not module.body


def test_documentation_lines_fit_the_page() -> None:
    too_long = [
        f"{relative(page)}: {line[:60]}…"
        for page in PAGES
        for line in page.read_text(encoding="utf-8").splitlines()
        if len(line) > 130 and not line.startswith("|")
    ]
    assert not too_long


def write_parameter_table(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    page.write_text(before + BEGIN + parameter_table(page) + END + after, encoding="utf-8")


if __name__ == "__main__":
    for algorithm_page in ALGORITHM_PAGES:
        write_parameter_table(algorithm_page)
