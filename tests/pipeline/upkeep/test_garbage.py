"""`refcache gc` on a whole workspace: what goes, what stays, and that a dry run changes nothing."""

import shutil

import polars as pl
import pytest

from cache import Journal, open_reference
from pipeline.data.suites import INDEX
from pipeline.files import write_json
from tests.project import ScoredProject, write_project
from tests.tiny import write_pairs


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    return write_project(tmp_path_factory.mktemp("garbage"))


@pytest.fixture
def project(sound, tmp_path):
    """With journals of the published reference, of rows rescored for it, and of another reference."""
    shutil.copytree(sound, tmp_path / "project")
    project = ScoredProject(tmp_path / "project")
    project.fill_journal()
    rows = open_reference(project.out, expect=None).scan().collect().to_arrow()
    project.ours = project.home / "journal" / project.identity.reference_id
    project.rescored, project.theirs = project.ours / "rescored", project.home / "journal" / ("0" * 32)
    for folder in (project.rescored, project.theirs):
        with Journal(folder) as journal:
            journal.append(rows.slice(0, 12))
            journal.append(rows.slice(12))
    for folder in ("damaged/x-1", "views", "answers"):
        (project.home / folder).mkdir(parents=True)
        (project.home / folder / "rows").write_bytes(bytes(5000))
    project.fewer = write_pairs(tmp_path / "fewer", 5)  # the first five of the same prompts
    return project


def gc(project, *flags, **options):
    options = {"--reference": project.out, "--pairs": project.fewer} | options
    words = [str(word) for option in options.items() for word in option]
    return project.run("gc", *words, *flags)


def tree(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def times(folder):
    return {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in sorted(folder.rglob("*"))}


def rows(folder):
    with Journal(folder) as journal:
        return pl.concat([pl.DataFrame(table) for table in journal.tables()]).sort("response_key")


def test_rows_of_current_pairs_stay_bit_for_bit_and_others_go(project):
    before = {folder: rows(folder) for folder in (project.ours, project.rescored, project.theirs)}
    needed = pl.read_parquet(project.fewer / "responses.parquet")["response_key"].to_list()
    published = tree(project.out)
    result = gc(project)
    assert result.exit_code == 0, result.output
    for folder in (project.ours, project.rescored):
        assert rows(folder).equals(before[folder].filter(pl.col("response_key").is_in(needed)))
        assert f"{folder}: kept 15 rows" in result.output
    assert result.output.count("dropped 9 rows") == 2
    assert rows(project.theirs).equals(before[project.theirs]) and tree(project.out) == published
    assert f"{project.home / 'views'}: kept, 4.9 KiB" in result.output


def test_rows_of_suites_stay(project):
    """Those that lie where the pipeline puts them, or where --suites says."""
    suites = project.root / "suites"
    shutil.copytree(project.pairs, suites / "one")
    write_json(suites / INDEX, ["one"])
    found = gc(project, "--suites", suites)
    assert found.exit_code == 0 and found.output.count("kept 24 rows") == 3 and "dropped 0 rows" in found.output


def test_rows_of_any_of_several_pairs_stay(project):
    more = gc(project, "--pairs", str(project.pairs))
    assert more.exit_code == 0 and more.output.count("kept 24 rows") == 3 and "dropped 0 rows" in more.output


def test_a_dry_run_says_what_would_go_and_changes_nothing(project):
    before = times(project.root), tree(project.root)
    flags = ("--other-references", "--damaged", "--views", "--answers")
    result = gc(project, "--dry-run", *flags)
    assert result.exit_code == 0 and result.output.count("dropped would be about 9 rows") == 2
    assert result.output.count("would be dropped, 4.9 KiB") == 3
    assert (times(project.root), tree(project.root)) == before
    planned = [line.partition(";")[0] for line in result.output.splitlines() if "journal" in line]
    done = [line.partition(";")[0] for line in gc(project, *flags).output.splitlines() if "journal" in line]
    assert [line.split(",")[0] for line in planned] == [line.split(",")[0] for line in done]


def test_other_references_damaged_files_and_views_go_when_asked(project):
    result = gc(project, "--other-references", "--damaged", "--views", "--answers")
    assert result.exit_code == 0
    assert not (project.theirs / "rows.journal").exists() and rows(project.ours).height == 15
    assert sorted(path.name for path in project.home.iterdir()) == ["journal"]


def test_without_a_published_reference_every_journal_keeps_what_pairs_use(project):
    shutil.rmtree(project.out)
    assert gc(project, "--other-references").exit_code == 2
    assert gc(project).output.count("kept 15 rows") == 3


def test_a_journal_that_is_being_written_is_left_alone(project):
    before = tree(project.ours)
    with Journal(project.ours):
        result = gc(project)
    assert result.exit_code == 1 and "is being written by pid" in result.stderr
    assert {path: content for path, content in tree(project.ours).items() if path.name != "lock"} == {
        path: content for path, content in before.items() if path.name != "lock"
    }


def test_pairs_without_responses_are_a_wrong_request_that_keeps_everything(project, tmp_path):
    before = tree(project.home)
    empty = write_pairs(tmp_path / "empty", 0)
    assert gc(project, **{"--pairs": empty}).exit_code == 2
    assert gc(project, **{"--pairs": tmp_path / "absent"}).exit_code == 2
    assert tree(project.home) == before


def test_an_empty_workspace_is_no_error(project):
    shutil.rmtree(project.home)
    result = gc(project)
    assert (result.exit_code, result.output) == (0, "Nothing to collect: there is no journal.\n")


def test_answers_that_are_being_written_are_left_alone(project):
    with Journal(project.home / "answers/x/logps"):
        result = gc(project, "--answers")
        assert result.exit_code == 1 and "is being written by pid" in result.stderr
    assert (project.home / "answers/x/logps/rows.journal").exists()
    assert gc(project, "--answers").exit_code == 0 and not (project.home / "answers").exists()
