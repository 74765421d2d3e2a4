"""Columns of a parquet file by dotted name: which there are, their types, and their values.

A name is that of a column, or leads into it: `image.bytes` is a field of a struct, `texts.user` a
field of each struct in a list.
"""
from collections.abc import Iterable
from typing import Any, NamedTuple

# Levels that parquet writes for a list, and that a dotted name leaves out.
LIST_LEVELS = {"list", "element", "item", "array", "bag", "array_element"}


class Column(NamedTuple):
    """name: as given. top: the column of the table. steps: the fields below it. leaves: the paths
    of the stored columns that hold it."""
    name: str
    top: str
    steps: tuple[str, ...]
    leaves: tuple[str, ...]


def is_list(kind: Any) -> bool:
    from pyarrow import types
    return (types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind))


def element_type(kind: Any) -> Any:
    """What a list holds; any other type itself."""
    while is_list(kind):
        kind = kind.value_type
    return kind


def is_text(kind: Any) -> bool:
    from pyarrow import types
    if types.is_dictionary(kind):
        kind = kind.value_type
    return (types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)
            or types.is_null(kind))


def is_bytes(kind: Any) -> bool:
    from pyarrow import types
    return (types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind)
            or types.is_fixed_size_binary(kind) or types.is_null(kind))


def find_column(metadata: Any, name: str, flag: str, image: bool = False) -> Column:
    """A column of a pyarrow FileMetaData. ValueError if there is none of that name, or its type is
    not text (with `image`, not bytes); it names the columns that are there, and the flag."""
    schema = metadata.schema.to_arrow_schema()
    top, steps = name, ()
    if name not in schema.names:
        top, *rest = name.split(".")
        steps = tuple(rest)
    if top not in schema.names:
        raise ValueError(f"no column {name!r} (it has {', '.join(schema.names)[:200]}); name one "
                         f"with {flag}")
    kind = element_type(schema.field(top).type)
    for step in steps:
        kind = element_type(field_type(kind, step, name, flag))
    if image and not is_bytes(kind):
        names = field_names(kind)
        if "bytes" not in names:
            raise ValueError(f"the column {name!r} holds {str(kind)[:80]}, not the bytes of images;"
                             f" name another with {flag}")
        steps += ("bytes",)
        kind = element_type(kind.field("bytes").type)
    if not (is_bytes(kind) if image else is_text(kind)):
        raise ValueError(f"the column {name!r} holds {str(kind)[:80]}, not "
                         f"{'the bytes of images' if image else 'text'}; name another with {flag}")
    wanted = [*(top.split(".") if not steps else [top]), *steps]
    paths = [metadata.schema.column(n).path for n in range(metadata.num_columns)]
    return Column(name, top, steps, tuple(path for path in paths if leads_to(path, wanted)))


def field_names(kind: Any) -> list[str]:
    from pyarrow import types
    if not types.is_struct(kind):
        return []
    return [kind.field(n).name for n in range(kind.num_fields)]


def field_type(kind: Any, step: str, name: str, flag: str) -> Any:
    names = field_names(kind)
    if step not in names:
        has = f"it has {', '.join(names)[:200]}" if names else f"it is {str(kind)[:80]}"
        raise ValueError(f"no field {step!r} for {name!r} ({has}); name one with {flag}")
    return kind.field(step).type


def leads_to(path: str, wanted: list[str]) -> bool:
    """Whether a stored column, such as texts.list.element.user, is in the wanted one."""
    rest = list(wanted)
    for level in path.split("."):
        if rest and level == rest[0]:
            rest.pop(0)
        elif rest and level not in LIST_LEVELS:
            return False
    return not rest


def pick(value: Any, steps: Iterable[str]) -> Any:
    """The value below a value of the top column; of a list, that of each element. Bytes in place of
    a struct are those of to_values, of text that is not UTF-8."""
    steps = list(steps)
    if not steps or value is None or isinstance(value, bytes):
        return value
    if isinstance(value, list):
        return [pick(element, steps) for element in value]
    return pick(value.get(steps[0]), steps[1:])


def first_bytes(value: Any) -> bytes | None:
    """The bytes of an image; of a list of images, those of the first."""
    while isinstance(value, list):
        value = value[0] if value else None
    return value


def texts(value: Any) -> Any:
    """A caption, or a flat list of captions, as json holds it."""
    if isinstance(value, list):
        flat: list[Any] = []
        for element in map(texts, value):
            flat += element if isinstance(element, list) else [element]
        return flat
    return value
