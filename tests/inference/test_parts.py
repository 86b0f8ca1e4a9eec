"""Parts: kept one by one, never mixed, joined in order."""

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from backfold import UserError
from backfold.inference.joined import join
from backfold.inference.table import (
    Plan,
    broken_of,
    check_out,
    claim_parts,
    from_bytes,
    make_part,
    remove_parts,
    replacing,
    to_bytes,
    with_broken,
)

PLAN = Plan({"job": "embed", "seed": 0}, count=10, part_size=4, batch_size=2)


def vectors(values: np.ndarray) -> pa.Array:
    flat = pa.array(values.astype(np.float32).ravel())
    return pa.FixedSizeListArray.from_arrays(flat, values.shape[1])


def part(indices):
    paths = [f"a/{'ä' * index}.png" for index in indices]
    values = np.array([[index, index / 2, -index] for index in indices]).reshape(-1, 3)
    return make_part(list(indices), paths, {"vector": vectors(values)})


def test_every_image_is_in_one_part():
    assert len(PLAN) == 3
    assert [list(PLAN.indices(number)) for number in range(3)] == [
        [0, 1, 2, 3], [4, 5, 6, 7], [8, 9],
    ]  # fmt: skip


def test_what_is_missing_is_known_after_a_stop(tmp_path):
    out = tmp_path / "v.npz"
    with claim_parts(out, PLAN, overwrite=False) as parts:
        parts.write(1, part(PLAN.indices(1)))
    with claim_parts(out, PLAN, overwrite=False) as parts:
        assert parts.missing() == [0, 2]
        assert parts.read(1).equals(part(PLAN.indices(1)))


@pytest.mark.parametrize("change", [{"count": 11}, {"facts": {"job": "embed", "seed": 1}}])
def test_parts_of_another_job_are_refused_or_removed(tmp_path, change):
    out = tmp_path / "v.npz"
    with claim_parts(out, PLAN, overwrite=False) as parts:
        parts.write(0, part(PLAN.indices(0)))
    other = Plan(**{**vars(PLAN), **change})
    (name,) = change.get("facts", change).keys() - {"job"}
    refusal = pytest.raises(UserError, match=rf"differ in {name}\); give --overwrite")
    with refusal, claim_parts(out, other, overwrite=False):
        pass
    with claim_parts(out, PLAN, overwrite=True) as parts:  # equal plans: still there
        assert parts.missing() == [1, 2]
    with claim_parts(out, other, overwrite=True) as parts:
        assert parts.missing() == [0, 1, 2]


def test_two_processes_do_not_share_parts(tmp_path):
    with claim_parts(tmp_path / "v.npz", PLAN, overwrite=False):
        refusal = pytest.raises(UserError, match=r"v\.npz\.parts is in use by another process")
        with refusal, claim_parts(tmp_path / "v.npz", PLAN, overwrite=True):
            pass


def test_a_folder_of_somebody_else_is_left_alone(tmp_path):
    (tmp_path / "v.npz.parts").mkdir()
    refusal = pytest.raises(UserError, match="is no folder of parts; choose another --out")
    with refusal, claim_parts(tmp_path / "v.npz", PLAN, overwrite=True):
        pass
    assert list((tmp_path / "v.npz.parts").iterdir()) == []


def test_a_damaged_part_is_named(tmp_path):
    with claim_parts(tmp_path / "v.npz", PLAN, overwrite=False) as parts:
        parts.write(0, part(PLAN.indices(0)))
        parts.path(0).write_bytes(b"PAR1 half")
        with pytest.raises(UserError, match=r"part-0000000\.parquet can't be read .*; remove it"):
            parts.read(0)


def test_a_part_remembers_what_was_broken():
    table = with_broken(part([1, 2]), ["a: torn", "b: “empty”"])
    assert broken_of(from_bytes(to_bytes(table))) == ["a: torn", "b: “empty”"]
    assert broken_of(part([1])) == []


@pytest.mark.parametrize("suffix", [".parquet", ".npz", ".csv"])
def test_joining_keeps_order_and_values(tmp_path, suffix):
    out = tmp_path / f"v{suffix}"
    kept = [0, 1, 3, 4, 5, 6, 7, 9]
    with claim_parts(out, PLAN, overwrite=False) as parts:
        for number in (2, 0, 1):
            table = part([index for index in PLAN.indices(number) if index in kept])
            if suffix == ".csv":
                energies = pa.array([index / 3 for index in table["index"].to_pylist()])
                table = table.drop_columns(["vector"]).append_column("energy", energies)
            parts.write(number, table)
        assert join(parts, out) == len(kept)
        remove_parts(parts)
    assert [path.name for path in tmp_path.iterdir()] == [out.name]
    expected = part(kept)
    if suffix == ".csv":
        table = pyarrow.csv.read_csv(out)
        assert table.column_names == ["path", "energy"]
        assert table["energy"].to_pylist() == [index / 3 for index in kept]
    elif suffix == ".parquet":
        table = pq.read_table(out)
        assert table.equals(expected.drop_columns(["index"]))
    else:
        with np.load(out) as arrays:
            assert sorted(arrays) == ["path", "vector"]
            assert arrays["path"].tolist() == expected["path"].to_pylist()
            assert arrays["vector"].dtype == np.float32
            assert arrays["vector"].tolist() == expected["vector"].to_pylist()


def test_npz_of_parts_without_rows(tmp_path):
    out, plan = tmp_path / "v.npz", Plan({}, 2, 1, 1)
    with claim_parts(out, plan, overwrite=False) as parts:
        parts.write(0, part([]))
        parts.write(1, part([1]))
        assert join(parts, out) == 1
    with np.load(out) as arrays:
        assert arrays["vector"].tolist() == [[1.0, 0.5, -1.0]]


def test_a_file_that_fails_midway_leaves_the_old_one(tmp_path):
    out = tmp_path / "v.csv"
    out.write_text("old")

    def write_half():
        with replacing(out) as file:
            file.write_text("half of the n")
            raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match=r"can't write .*v\.csv: No space"):
        write_half()
    assert out.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["v.csv"]


def test_unfit_output_files_are_refused_before_anything_is_computed(tmp_path):
    (tmp_path / "a.csv").write_text("")
    (tmp_path / "b.csv").mkdir()
    with pytest.raises(UserError, match=r"no known format; end it in \.csv or \.npz"):
        check_out(tmp_path / "a.txt", (".csv", ".npz"), (), overwrite=True)
    with pytest.raises(UserError, match=r"a\.csv exists; give --overwrite"):
        check_out(tmp_path / "a.csv", (".csv",), (), overwrite=False)
    with pytest.raises(UserError, match=r"a\.csv exists; give --overwrite"):
        check_out(tmp_path / "c.csv", (".csv",), (tmp_path / "a.csv",), overwrite=False)
    with pytest.raises(UserError, match=r"b\.csv is a folder"):
        check_out(tmp_path / "b.csv", (".csv",), (), overwrite=True)
    check_out(tmp_path / "a.csv", (".csv",), (), overwrite=True)
