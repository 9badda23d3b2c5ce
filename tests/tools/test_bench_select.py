"""What the bench of selection trains on is what its labels say."""

import json

import bench_forgetting
import bench_select


def test_labels_are_of_the_rows_and_a_tenth_is_drawn_of_them(tmp_path):
  config = bench_forgetting.configured({}, tmp_path / "run", 0, True)
  kinds = bench_select.write_rows(config, tmp_path, 0, 0.5)
  plain = bench_select.write_rows(config, tmp_path / "plain", 0, 0.0)
  assert not any(plain.values())
  read = lambda path: [json.loads(x) for x in path.read_text().splitlines()]
  files = sorted(path.name for path in (tmp_path / "all").iterdir())
  assert len(files) == len(bench_forgetting.SMALL) - 1
  for name in files:
    given = read(tmp_path / "plain" / "all" / name)
    rows = read(tmp_path / "all" / name)
    labels = [kinds[f"{name}:{n}"] for n in range(1, len(rows) + 1)]
    # Rows that are not spoilt are as they were, in their order.
    sound = [row for row, kind in zip(rows, labels, strict=True) if not kind]
    assert all(row in given for row in sound)
    assert 0.35 < sum(map(bool, labels)) / len(rows) < 0.5
    drawn = [x for x in kinds if x.startswith(f"random {name}:")]
    some = read(tmp_path / "random" / name)
    assert len(drawn) == len(some) == round(bench_select.KEEP * len(rows))
    at = [int(x.rpartition(":")[2]) for x in drawn]
    assert some == [rows[i] for i in at]
    assert [kinds[x] for x in drawn] == [labels[i] for i in at]
