"""`refcache gc`: give back the disk space of journalled rows that no current pair uses."""

from pathlib import Path

import click

from stages.options import default_path_option
from stages.tables import show_bytes


@click.command(name="gc")
@click.option(
    "--pairs",
    type=click.Path(path_type=Path),
    multiple=True,
    required=True,
    help="Prepared pairs whose rows stay; repeatable, for data of other branches.",
)
@default_path_option("--reference", "data/reference/logps", "The published reference cache; only read.")
@default_path_option("--suites", "data/prepared/suites", "Prepared suites, where there are any: their rows stay too.")
@default_path_option("--sketches", "data/reference/sketches", "The published sketches; only read.")
@click.option("--other-references", is_flag=True, help="Also drop the journals of every other reference.")
@click.option("--damaged", is_flag=True, help="Also drop what `verify --repair` moved aside.")
@click.option("--views", is_flag=True, help="Also drop the data loaders' copies; they are made again.")
@click.option("--answers", is_flag=True, help="Also drop what evaluate and sample asked of models; it is asked again.")
@click.option("--dry-run", is_flag=True, help="Say what would go; change nothing.")
def command(
    pairs: tuple[Path, ...],
    reference: Path,
    suites: Path,
    sketches: Path,
    other_references: bool,
    damaged: bool,
    views: bool,
    answers: bool,
    dry_run: bool,
) -> None:
    """Drop journalled rows that no current pair uses, and no others. What is published is never touched.

    Journals make killed runs resume and let data grow back without computing. Journals of other references, or of other
    sketches, than the published ones stay whole unless --other-references is given. A journal that is being written is
    left alone.

    \b
    Example:
      refcache gc --pairs data/prepared/pairs --dry-run
      refcache gc --pairs data/prepared/pairs --pairs ../other-branch/data/prepared/pairs
    """
    from pipeline.data.suites import INDEX, suite_folders
    from pipeline.upkeep.garbage import collect_garbage

    of_suites = suite_folders(suites).values() if (suites / INDEX).is_file() else ()

    done = collect_garbage(
        pairs=[*pairs, *of_suites],
        reference=reference,
        sketches=sketches,
        other_references=other_references,
        damaged=damaged,
        views=views,
        answers=answers,
        dry_run=dry_run,
    )
    about = "would be about " if dry_run else ""
    for journal in done.journals:
        click.echo(
            f"{journal.folder}: kept {journal.kept_rows:,} rows, {show_bytes(journal.kept_bytes)}; "
            f"dropped {about}{journal.dropped_rows:,} rows, {show_bytes(journal.dropped_bytes)}"
        )
    for folder, size, dropped in done.folders:
        word = ("would be dropped" if dry_run else "dropped") if dropped else "kept"
        click.echo(f"{folder}: {word}, {show_bytes(size)}")
    if not done.journals and not done.folders:
        click.echo("Nothing to collect: there is no journal.")
