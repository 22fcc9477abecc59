from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from flextok.schema import ConfigError, build, from_mapping, to_mapping


@dataclass
class Inner:
    rate: float = 0.1
    kind: Literal["a", "b"] = "a"


@dataclass
class Outer:
    size: int
    inner: Inner = field(default_factory=Inner)
    name: str | None = None
    sizes: list[int] = field(default_factory=list)
    flag: bool = False
    extra: dict[str, Any] = field(default_factory=dict)


def test_round_trip():
    outer = from_mapping(Outer, {"size": 3, "inner": {"rate": 1}, "sizes": [1, 2]})
    assert outer == Outer(3, Inner(1.0), None, [1, 2])
    assert from_mapping(Outer, to_mapping(outer)) == outer


def test_yaml_reads_some_floats_as_text():
    assert from_mapping(Inner, {"rate": "1e-4"}).rate == 1e-4


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"size": 3, "siez": 4}, r"unknown key 'siez'.*Did you mean 'size'\?.*Known: extra, flag"),
        ({"size": 3, "inner": {"rat": 1}}, r"unknown key 'rat' in 'inner'.*Did you mean 'rate'"),
        ({}, "missing key 'size'"),
        ({"size": "three"}, "size='three' must be of type int"),
        ({"size": 3.5}, "size=3.5 must be of type int"),
        ({"size": True}, "size=True must be of type int"),
        ({"size": 3, "flag": 1}, "flag=1 must be of type bool"),
        ({"size": 3, "inner": {"kind": "c"}}, "inner.kind='c' must be one of 'a', 'b'"),
        ({"size": 3, "sizes": [1, "x"]}, r"sizes\[1\]='x'"),
        ({"size": 3, "sizes": 4}, "sizes=4 must be a list"),
        ({"size": 3, "inner": 4}, "inner must be a mapping"),
        ({"size": 3, "name": 4}, "name=4 must be of type str"),
    ],
)
def test_mistakes_name_the_key_and_the_remedy(values, message):
    with pytest.raises(ConfigError, match=message):
        from_mapping(Outer, values)


class Widget:
    def __init__(self, width: int, height: int = 2):
        self.area = width * height


def scale(x: float, factor: float = 2.0) -> float:
    return x * factor


REGISTRY = {"widget": Widget, "scale": scale}


def test_build_classes_and_functions():
    assert build(REGISTRY, {"name": "widget", "width": 3}, "part").area == 6
    assert build(REGISTRY, "scale", "part")(3) == 6
    assert build(REGISTRY, {"name": "scale", "factor": 5}, "part")(3) == 15


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("widgt", "unknown part 'widgt'. Did you mean 'widget'"),
        ({"name": "widget", "widht": 3}, "unknown key 'widht' in 'part widget'.*'width'"),
        ({"name": "widget"}, "part 'widget' needs width"),
        ({"width": 3}, "part needs a name. Known: scale, widget"),
    ],
)
def test_build_mistakes(spec, message):
    with pytest.raises(ConfigError, match=message):
        build(REGISTRY, spec, "part")
