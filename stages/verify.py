"""`refcache verify`: read every byte of a reference cache and say what is wrong with it."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from cache.manifest import Shard


@click.command(name="verify")
@click.argument("path", type=click.Path(path_type=Path))
def command(path: Path) -> None:
    """Check the reference cache in folder PATH for damaged, missing and foreign files; nothing is changed.

    Exits with 1 when something is wrong, after a line for each finding and its remedy.

    \b
    Example:
      refcache verify data/reference/logps
    """
    from cache import CacheCorrupt, verify

    findings = verify(path, on_sound=_report)
    for finding in findings:
        click.echo(f"{finding.file}: {finding.problem}\n  {finding.remedy}")
    if findings:
        raise CacheCorrupt(f"{path}: {len(findings)} finding{'s' if len(findings) > 1 else ''}, listed above.")
    click.echo(f"{path}: sound")


def _report(shard: "Shard") -> None:
    click.echo(f"{shard.file}: sound, {shard.rows} rows, {shard.tokens} tokens, {shard.bytes} bytes")
