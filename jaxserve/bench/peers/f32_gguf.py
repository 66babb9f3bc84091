"""Writes a GGUF file's weights out as float32, so that every side reads the same numbers."""

from pathlib import Path
from typing import Any

from jaxserve.core.errors import CheckpointError

_SKIPPED = ("GGUF.", "general.architecture", "general.file_type", "general.quantization_version")


def write_f32_gguf(source: Path, target: Path) -> None:
    """Copy `source` to `target` with every tensor dequantised to float32.

    Metadata (architecture, tokenizer, chat template) is copied as it is. The file appears
    under its name only when it is complete.

    Raises:
        CheckpointError: the source is not a GGUF file.
    """
    import gguf

    try:
        reader = gguf.GGUFReader(source)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{source} is not a readable GGUF file: {error}") from error
    architecture = _field(reader, "general.architecture")
    partial = target.with_name(target.name + ".partial")
    writer = gguf.GGUFWriter(partial, architecture)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    for name, field in reader.fields.items():
        if name.startswith(_SKIPPED):
            continue
        inner = field.types[1] if len(field.types) > 1 else None
        writer.add_key_value(name, field.contents(), field.types[0], sub_type=inner)
    for tensor in reader.tensors:
        # A quantised tensor's data is rows of blocks; its shape is stored innermost first.
        data = gguf.dequantize(tensor.data, tensor.tensor_type)
        writer.add_tensor(tensor.name, data.reshape(tuple(reversed(tensor.shape.tolist()))))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    partial.replace(target)


def _field(reader: Any, name: str) -> Any:
    field = reader.get_field(name)
    if field is None:
        raise CheckpointError(f"GGUF metadata has no {name}")
    return field.contents()
