"""Results: shapes and names checked, files that are the same each time, hostile files refused."""

from __future__ import annotations

import csv
import io
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest

from lab.errors import ConfigError, LabError, UsageError
from lab.result import Result, stack


def made(values: object = None, **changes: object) -> Result:
    given = np.arange(6.0).reshape(2, 3) if values is None else values
    fields: dict[str, object] = {
        "axes": ("pathway", "layer"), "coords": {"pathway": ["a->b", "b->c"], "layer": [1, 2, 3]},
        "unit": "% change in probability", "recipe": {"kind": "probes.x.Y", "window": 9}, "name": "trace",
    }  # fmt: skip
    return Result(given, **{**fields, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"axes": ("layer",)}, "1 axes ('layer',) but values has 2 dimensions (2, 3)"),
        ({"axes": ("layer", "layer")}, "axes must be different"),
        ({"axes": ("pathway", "value")}, "cannot be called 'value'"),
        ({"coords": {"pathway": ["a", "b"]}}, "['pathway'] but the axes are ['layer', 'pathway']"),
        ({"coords": {"pathway": ["a", "b"], "layer": [1, 2]}}, "2 coordinates but values has 3 entries"),
        (
            {"coords": {"pathway": ["a", None], "layer": [1, 2, 3]}},
            "must be finite numbers or texts, got None",
        ),
        ({"coords": {"pathway": ["a", float("nan")], "layer": [1, 2, 3]}}, "got nan"),
        ({"low": np.zeros((2, 3))}, "both low and high"),
        ({"low": np.zeros((2, 2)), "high": np.zeros((2, 3))}, "low has shape (2, 2) but values has (2, 3)"),
        ({"values": [[1, 2, 3], [4, 5]]}, "different lengths"),
        ({"values": np.array([["a"] * 3] * 2)}, "real numbers, got dtype <U1"),
        ({"values": np.zeros((2, 3), complex)}, "real numbers, got dtype complex128"),
        ({"notes": {"model": object()}}, "notes.model holds a object"),
        ({"unit": 3}, "unit and name must be text"),
    ],
)
def test_misfits_are_named_with_both_numbers(changes: dict[str, object], said: str) -> None:
    with pytest.raises(UsageError) as e:
        made(**changes)
    assert said in str(e.value)


def test_values_cannot_be_changed_from_outside() -> None:
    source = np.zeros((2, 3))
    r = made(source)
    source[0, 0] = 7
    assert r.values[0, 0] == 0
    with pytest.raises(ValueError, match="read-only"):
        r.values[0, 0] = 1


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "int64", "uint8", "bool", ">f8"])
def test_a_saved_result_comes_back_bit_for_bit(tmp_path: Path, dtype: str) -> None:
    values = np.array([[0, 1, 0], [1, 1, 0]]).astype(dtype)
    r = made(values, notes={"n": {"item": 8}, "inf": float("-inf"), "deep": [{"x": None}]}, baseline=0.0)
    back = Result.load(r.save(tmp_path / "deep" / "r.npz"))
    assert back.same(r)
    assert back.values.dtype.newbyteorder("=") == np.dtype(dtype).newbyteorder("=")
    assert back.notes["inf"] == float("-inf")


def test_nan_and_infinity_survive(tmp_path: Path) -> None:
    r = made([[np.nan, np.inf, -np.inf], [0.1, -0.0, 5e-324]])
    back = Result.load(r.save(tmp_path / "r.npz"))
    assert np.array_equal(back.values, r.values, equal_nan=True)
    assert np.signbit(back.values[1, 1])
    assert (r.not_finite, back.not_finite) == (3, 3)


def test_a_single_number_needs_no_axes(tmp_path: Path) -> None:
    r = Result(0.25, (), {}, "probability", {})  # type: ignore[arg-type]
    assert Result.load(r.save(tmp_path / "r.npz")).same(r)
    assert r.tidy() == [{"value": 0.25}]


def test_saving_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    a = made().save(tmp_path / "a.npz").read_bytes()
    b = made(np.asfortranarray(np.arange(6.0).reshape(2, 3))).save(tmp_path / "b.npz").read_bytes()
    assert a == b
    assert made(unit="%").save(tmp_path / "c.npz").read_bytes() != a
    assert not list(tmp_path.glob(".*"))  # no temporary file stays


def test_numpy_reads_the_file_without_pickle(tmp_path: Path) -> None:
    with np.load(made().save(tmp_path / "r.npz"), allow_pickle=False) as z:
        assert json.loads(z["meta"].tobytes())["axes"] == ["pathway", "layer"]


def spoilt(tmp_path: Path, how: str) -> Path:
    path = made().save(tmp_path / "r.npz")
    whole = path.read_bytes()
    if how == "missing":
        return tmp_path / "none.npz"
    if how == "folder":
        return tmp_path
    if how in ("cut", "flipped", "text", "empty"):
        byte = whole.index(b"\x93NUMPY") + 200
        data = {"cut": whole[:200], "flipped": whole[:byte] + bytes([whole[byte] ^ 255]) + whole[byte + 1 :]}
        path.write_bytes(data.get(how, b"hello" if how == "text" else b""))
        return path
    if how == "foreign":
        np.savez(path, a=np.zeros(3))
    elif how == "compressed":
        np.savez_compressed(path, values=np.zeros((500, 500)), meta=np.zeros(1, np.uint8))
    elif how == "pickle":
        np.savez(path, values=np.array([{}], dtype=object), meta=np.zeros(1, np.uint8))
    elif how == "huge header":
        _rewrite(path, "values.npy", lambda b: b.replace(b"(2, 3)", b"(9999999999, 3)").ljust(len(b)))
    elif how == "other format":
        _rewrite(path, "meta.npy", lambda b: b.replace(b"videollm-lab result", b"somebody else's one"))
    elif how == "newer":
        _rewrite(path, "meta.npy", lambda b: b.replace(b'"version": 1', b'"version": 7'))
    elif how == "shape":
        _rewrite(path, "meta.npy", lambda b: b.replace(b"[1, 2, 3]", b"[1, 23  ]"))
    return path


def _rewrite(path: Path, name: str, change: object) -> None:
    with zipfile.ZipFile(path) as z:
        parts = {n: z.read(n) for n in z.namelist()}
    parts[name] = change(parts[name])  # type: ignore[operator]
    with zipfile.ZipFile(path, "w") as z:
        for n, data in parts.items():
            z.writestr(n, data)


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("missing", "no file"), ("folder", "not a saved Result"), ("cut", "damaged"), ("flipped", "damaged"),
        ("text", "damaged or not"), ("empty", "damaged or not"), ("foreign", "it holds ['a']"),
        ("compressed", "is compressed"), ("pickle", "damaged or not"), ("huge header", "damaged or not"),
        ("other format", "does not say"), ("newer", "version 7, this lab reads version 1"),
        ("shape", "2 coordinates but values has 3"),
    ],
)  # fmt: skip
def test_a_file_that_is_no_result_is_a_config_error(tmp_path: Path, how: str, said: str) -> None:
    with pytest.raises(ConfigError) as e:
        Result.load(spoilt(tmp_path, how))
    assert said in str(e.value) and "\n" not in str(e.value)


def test_a_place_that_cannot_be_written_is_an_error_of_ours(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(LabError, match="cannot write"):
        made().save(tmp_path / "file" / "r.npz")


def test_select_by_coordinate() -> None:
    r = made(low=np.zeros((2, 3)), high=np.ones((2, 3)))
    row = r.select(pathway="b->c")
    assert row.axes == ("layer",) and row.values.tolist() == [3, 4, 5]
    assert row.notes["selected"] == {"pathway": "b->c"} and row.low is not None and row.low.shape == (3,)
    assert r.select(layer=[3, 1]).values.tolist() == [[2, 0], [5, 3]]
    assert float(r.select(layer=2, pathway="a->b").values) == 1.0


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        ({"pathway": "b->"}, "closest: b->c"),
        ({"layer": 9}, "no layer 9 among 3 coordinates"),
        ({"layer": "2"}, "no layer '2'"),
        ({"head": 1}, "no axis 'head'; the axes are pathway, layer"),
    ],
)
def test_select_names_what_is_there(wanted: dict[str, object], said: str) -> None:
    with pytest.raises(UsageError) as e:
        made().select(**wanted)
    assert said in str(e.value)


def test_selecting_a_coordinate_that_stands_twice_is_refused() -> None:
    r = made(coords={"pathway": ["a", "a"], "layer": [1, 2, 3]})
    with pytest.raises(UsageError, match="stands 2 times among 2"):
        r.select(pathway="a")


def test_mean_has_an_interval_that_covers_the_truth() -> None:
    rng = np.random.default_rng(0)
    hits = 0
    for trial in range(100):
        sample = Result(rng.normal(3.0, 1.0, 40), ("item",), {"item": range(40)}, "x", {}).mean(
            "item", seed=trial
        )
        assert sample.low is not None and sample.high is not None
        hits += bool(sample.low <= 3.0 <= sample.high)
    assert 88 <= hits <= 99  # 95 % of 100, less the small-sample bias of the percentile bootstrap


def test_mean_is_seeded_and_counts_what_it_averaged() -> None:
    values = np.random.default_rng(1).normal(size=(20, 3))
    r = made(values, coords={"pathway": [f"p{i}" for i in range(20)], "layer": [1, 2, 3]})
    a, b, other = r.mean("pathway"), r.mean("pathway"), r.mean("pathway", seed=1, n_boot=50)
    assert a.same(b) and not a.same(other)
    assert a.axes == ("layer",) and a.notes["n"] == {"pathway": 20}
    assert np.allclose(a.values, r.values.mean(0), rtol=0, atol=1e-15)


def test_mean_takes_nan_for_missing_and_lets_infinity_show() -> None:
    r = made([[1.0, np.nan, np.inf], [3.0, np.nan, 1.0]]).mean("pathway")
    assert r.values[0] == 2.0 and np.isnan(r.values[1]) and not np.isfinite(r.values[2])
    assert r.low is not None and np.isfinite(r.low[0]) and np.isnan(r.low[1])


def test_the_mean_of_one_has_no_interval_and_of_none_is_refused() -> None:
    one = made(np.ones((1, 3)), coords={"pathway": ["a"], "layer": [1, 2, 3]}).mean("pathway")
    assert one.low is None and one.high is None
    with pytest.raises(UsageError, match="0 entries"):
        made(np.ones((0, 3)), coords={"pathway": [], "layer": [1, 2, 3]}).mean("pathway")


def test_tidy_rows_and_csv_carry_every_number(tmp_path: Path) -> None:
    r = made(np.array([[0.1, np.nan, 1 / 3], [1e-300, 2, 3]]), low=np.zeros((2, 3)), high=np.ones((2, 3)))
    assert r.tidy()[2] == {"pathway": "a->b", "layer": 3, "value": 1 / 3, "low": 0.0, "high": 1.0}
    rows = list(csv.DictReader(io.StringIO(r.to_csv(tmp_path / "r.csv").read_text())))
    assert np.array_equal([float(row["value"]) for row in rows], r.values.ravel(), equal_nan=True)
    assert [row["layer"] for row in rows] == ["1", "2", "3"] * 2


def test_json_has_null_for_what_is_not_finite_and_says_so() -> None:
    data = json.loads(made([[np.nan, 1, -np.inf], [0, 0, 0]]).to_json(), parse_constant=pytest.fail)
    assert data["values"][0] == [None, 1.0, None] and data["not_finite"] == 2


def test_repr_says_what_it_is() -> None:
    assert repr(made()) == "<Result 'trace': pathway 2 x layer 3, % change in probability>"


# ---- stack ----------------------------------------------------------------------------------------------------------


def test_stack_puts_results_side_by_side_and_keeps_intervals():
    def curve(scale, low=None):
        bounds = {} if low is None else {"low": np.array(low), "high": np.array(low) + 2}
        return Result(scale * np.arange(2.0), "layer", {"layer": [1, 2]}, "%", {"kind": "x"}, **bounds)

    both = stack({"a": curve(1), "b": curve(3, [-1.0, 0.0])}, "model")
    assert both.axes == ("model", "layer") and both.coords["model"] == ["a", "b"] and both.recipe == {}
    assert both.values.tolist() == [[0, 1], [0, 3]] and both.low is not None
    assert np.isnan(both.low[0]).all() and both.low[1].tolist() == [-1, 0]
    assert stack({"a": curve(1)}, "model").low is None
    with pytest.raises(UsageError, match="must be alike"):
        stack({"a": curve(1), "b": Result(np.zeros(2), "layer", {"layer": [2, 3]}, "%", {})}, "model")
    with pytest.raises(UsageError, match="axis 'layer' already"):
        stack({"a": curve(1)}, "layer")
    with pytest.raises(UsageError, match="nothing to stack"):
        stack({}, "model")
