"""How an argument of ``simlab.run`` has to be written, where Hydra can't read it as it was given."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from pathlib import Path

import yaml
from hydra.core.override_parser.types import Quote, QuotedString

from simlab.config.errors import ConfigError
from simlab.config.keys import known_keys
from simlab.config.names import nearest, nearest_key
from simlab.config.schema import CONF_DIR

OPTIONS = {
    "--help", "-h", "--hydra-help", "--version", "--cfg", "-c", "--resolve", "--package", "-p",
    "--run", "-r", "--multirun", "-m", "--shell-completion", "-sc", "--config-path", "-cp",
    "--config-name", "-cn", "--config-dir", "-cd", "--experimental-rerun", "--info", "-i", "--",
}  # fmt: skip
MULTIRUN = {"-m", "--multirun"}
# Keys of the command line that aren't in a run's own config.
OTHER_KEYS = ("+experiment", "+recipe", "hydra/launcher", "hydra.run.dir", "hydra.sweep.dir")
TEXTS = (  # last parts of keys
    "prompt", "path", "revision", "name", "results", "dir", "text", "update", "mlp_update",
)  # fmt: skip
SWITCHES = ("dry_run", "gradients", "svg")


def refuse_options(args: Sequence[str]) -> None:
    """Raises ConfigError for a key that is written as an option: ``--depth=8``, ``--depth 8``."""
    for arg, following in zip(args, [*args, "-"][1:], strict=True):
        option, equals, value = arg.partition("=")
        if not option.startswith("-") or option in OPTIONS:
            continue
        keys = {key.lstrip("+"): key for key in (*known_keys(), *OTHER_KEYS)}
        name = option.lstrip("-").replace("-", "_")
        if name not in keys:
            near = nearest(option, OPTIONS) or nearest_key(name, keys.values()) or "; see --help"
            raise ConfigError(f"{arg}: no such option, and keys are written key=value{near}")
        if not equals and ("=" in following or following.startswith("-")):
            value = "true" if name in SWITCHES else "VALUE"
        elif not equals:
            value = following
        raise ConfigError(f"{arg}: write {shell_word(f'{keys[name]}={value}')}, without dashes")


def refuse_own_files(args: Sequence[str]) -> None:
    """Raises ConfigError for a file in DIR of ``-cd DIR`` that Hydra would pass by, or can't read.

    Of two files of one group and name it takes simlab's, silently.
    """
    groups = sorted({path.parent.relative_to(CONF_DIR) for path in CONF_DIR.glob("*/**/*.yaml")})
    for option, following in zip(args, [*args, ""][1:], strict=True):
        name, equals, value = option.partition("=")
        if name not in ("-cd", "--config-dir"):
            continue
        folder = Path(value if equals else following)
        for group in groups:
            for path in sorted((folder / group).glob("*.yaml")):
                _refuse_own_file(path, group)


def _refuse_own_file(path: Path, group: Path) -> None:
    if not path.is_file():
        return
    content, same_name = path.read_bytes(), CONF_DIR / group / path.name
    if same_name.is_file() and same_name.read_bytes() != content:
        taken = f"{group}={path.stem}"
        raise ConfigError(f"{path}: {taken} is simlab's own, and would be taken; rename this file")
    try:
        read = yaml.safe_load(content.decode())
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text (byte {error.start})") from None
    if isinstance(read, dict) and not isinstance(read.get("defaults", []), list):
        raise ConfigError(f"{path}: defaults={read['defaults']}: allowed: a list, as [custom]")


def shell_word(text: str) -> str:
    """A text as one word of a shell: as shlex.quote has it, but apostrophes in double quotes."""
    if "'" not in text or re.search(r"[$`\\!]", text):
        return shlex.quote(text)
    return '"' + text.replace('"', r"\"") + '"'


def quoted(text: str) -> str:
    """A text in quotes, as Hydra's grammar has it."""
    return QuotedString(text, Quote.single if '"' in text else Quote.double).with_quotes()


def as_text(key: str, *values: str) -> str:
    """``key=value`` as a shell must be given it, so that Hydra reads the values as texts."""
    whole = f"{key}={','.join(map(quoted, values))}"
    if whole.isprintable():
        return shell_word(whole)
    # Line breaks and the like, as bash and zsh take them: $'one\u000atwo'.
    whole = whole.replace("\\", r"\\").replace("'", r"\'")
    shown = (c if c.isprintable() else rf"\u{ord(c):04x}" for c in whole)
    return f"$'{''.join(shown)}'"


def how_to_write(override: str, sweep: bool) -> str:
    """The line about an override that Hydra can't read. sweep: commas part the values of a sweep."""
    key, _, value = override.partition("=")
    if not re.fullmatch(r"[+~]*[\w./@:$-]+", key, re.ASCII) or value[:1] in ("", "="):
        known = f", as {override}=VALUE" if override in known_keys() else ""
        return f"{override}: not of the form key=value{known}"
    try:
        override.encode()
    except UnicodeEncodeError as error:
        byte = ord(override[error.start]) - 0xDC00  # as Python keeps it in a text
        return f"{override}: not UTF-8 text (byte 0x{byte:02x}); convert it to UTF-8"
    if re.search(r"[][(){}]", value) and key.rpartition(".")[2] not in TEXTS:
        if key == "norm":
            return f"{override}: a formula is {as_text('norm=custom norm.update', value)}"
        return f"{override}: its brackets can't be read; a list is [1,2], a swept range range(1,5)"
    written = as_text(key, *(value.split(",") if sweep else [value]))
    return f"{override}: has characters that need quotes; write {written}"


def needs_multirun(override: str) -> str:
    """The line about an override with several values, without -m."""
    key, _, value = override.partition("=")
    line = f"{override}: several values need -m: python -m simlab.run -m {shell_word(override)}"
    if key == "seeds" and re.fullmatch(r"[\d, ]+", value):
        line += f"; a list is seeds=[{value}]"
    if re.fullmatch(r"0,\d+", value):
        line += f"; a number has a point: {key}={value.replace(',', '.')}"
    if key.rpartition(".")[2] in TEXTS:
        line += f"; a text with commas is {as_text(key, value)}"
    return line
