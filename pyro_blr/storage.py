"""A posterior as one .safetensors file: λ as tensors, all else that rebuilding q takes as metadata."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import safetensors
import torch
from pyro.distributions import constraints
from safetensors.torch import save_file
from torch import Tensor

from pyro_blr.blocks import Block
from pyro_blr.families import (
    DiagonalNormal,
    ExponentialFamily,
    Pattern,
    SparseNormal,
    TransformedNormal,
    pushforward_family,
)
from pyro_blr.graph import Plate, Site
from pyro_blr.members import Member

__all__ = ["Prior", "read", "snapshot", "write"]

FORMAT, VERSION = "pyro_blr.Posterior", 1


@dataclass(frozen=True)
class Prior:
    """What is left of a site's distribution once its model is gone."""

    support: Any
    event_dim: int


def snapshot(block: Block) -> Block:
    """The same block with every plate at its full size and nothing of the model behind it."""
    plates = tuple(replace(plate, subsample_size=plate.size) for plate in block.plates)
    members = tuple(replace(member, site=_site_snapshot(member.site)) for member in block.members)
    return replace(block, members=members, plates=plates, batch_shape=block.full_shape)


def _site_snapshot(site: Site) -> Site:
    shape = list(site.shape)
    event_dim = site.distribution.event_dim
    for plate in site.plates:
        shape[plate.dim - event_dim] = plate.size
    plates = tuple(replace(plate, subsample_size=plate.size) for plate in site.plates)
    prior = Prior(site.support, event_dim)
    return replace(site, distribution=prior, shape=torch.Size(shape), plates=plates, infer={})


def write(
    path: str | os.PathLike,
    blocks: Mapping[str, Block],
    naturals: Mapping[str, Tensor],
    about: Mapping[str, Any],
) -> None:
    """Writes the file whole or not at all."""
    tensors = {f"natural/{name}": natural.detach().contiguous().clone() for name, natural in naturals.items()}
    content = {
        "version": VERSION,
        "blocks": [_encode_block(block, tensors) for block in blocks.values()],
        "digest": _digest(tensors),
        "about": dict(about),
    }
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        save_file(tensors, temporary, metadata={FORMAT: json.dumps(content)})
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read(path: str | os.PathLike, device: Any) -> tuple[dict[str, Block], dict[str, Tensor], dict[str, Any]]:
    """(blocks, λ, about) of a file that `write` made."""
    try:
        with safetensors.safe_open(path, framework="pt", device=str(device)) as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path}: found {error}, expected a .safetensors file by Posterior.save") from error
    if FORMAT not in metadata:
        found = f"metadata {sorted(metadata)} and tensors {sorted(tensors)[:5]}"
        raise ValueError(f"{path}: found {found}, expected {FORMAT!r}: a file by Posterior.save")
    try:
        content = json.loads(metadata[FORMAT])
        _check(content, tensors)
        device = torch.device(device)
        blocks = {item["name"]: _decode_block(item, tensors, device) for item in content["blocks"]}
        naturals = {name: tensors[f"natural/{name}"] for name in blocks}
        return blocks, naturals, content["about"]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: this posterior cannot be read: {error}; save it again") from error


def _check(content: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    if content["version"] != VERSION:
        raise ValueError(f"found version {content['version']} of the file, expected {VERSION}")
    if content["digest"] != _digest(tensors):
        raise ValueError("found tensors that differ from the ones saved: the file is damaged")


def _digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, dtypes, shapes and bytes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


# --------------------------------------------------------------------------------------------------------
# Blocks


def _encode_block(block: Block, tensors: dict[str, Tensor]) -> dict[str, Any]:
    if block.states is not None:
        tensors[f"states/{block.name}"] = block.states.contiguous().clone()
    return {
        "name": block.name,
        "family": _encode_family(block.family, tensors),
        "members": [_encode_member(member, tensors) for member in block.members],
        "plates": [_encode_plate(plate) for plate in block.plates],
        "batch_shape": list(block.batch_shape),
        "elements": block.elements,
    }


def _decode_block(item: Mapping[str, Any], tensors: Mapping[str, Tensor], device: torch.device) -> Block:
    return Block(
        name=item["name"],
        family=_decode_family(item["family"], tensors),
        members=tuple(_decode_member(member, tensors, device) for member in item["members"]),
        plates=tuple(_decode_plate(plate) for plate in item["plates"]),
        batch_shape=torch.Size(item["batch_shape"]),
        elements=item["elements"],
        states=tensors.get(f"states/{item['name']}"),
    )


def _encode_member(member: Member, tensors: dict[str, Tensor]) -> dict[str, Any]:
    site = member.site
    return {
        "name": site.name,
        "start": member.start,
        "stop": member.stop,
        "shape": list(site.shape),
        "dtype": str(site.dtype).removeprefix("torch."),
        "plates": [_encode_plate(plate) for plate in site.plates],
        "event_dim": site.distribution.event_dim,
        "support": _encode(site.support, tensors),
        "family": None if member.family is None else _encode_family(member.family, tensors),
    }


def _decode_member(item: Mapping[str, Any], tensors: Mapping[str, Tensor], device: torch.device) -> Member:
    site = Site(
        name=item["name"],
        distribution=Prior(_decode(item["support"], tensors), item["event_dim"]),
        shape=torch.Size(item["shape"]),
        dtype=getattr(torch, item["dtype"]),
        device=device,
        plates=tuple(_decode_plate(plate) for plate in item["plates"]),
        infer={},
    )
    family = None if item["family"] is None else _decode_family(item["family"], tensors)
    return Member(site, item["start"], item["stop"], family)


def _encode_plate(plate: Plate) -> list[Any]:
    return [plate.name, plate.dim, plate.size]


def _decode_plate(item: list[Any]) -> Plate:
    name, dim, size = item
    return Plate(name, dim, size, size)


# --------------------------------------------------------------------------------------------------------
# Families and supports


def _encode_family(family: ExponentialFamily, tensors: dict[str, Tensor]) -> dict[str, Any]:
    name = type(family).__name__
    if isinstance(family, TransformedNormal):
        return {
            "name": name,
            "support": _encode(family.support, tensors),
            "event_shape": list(family.event_shape),
            "diagonal": isinstance(family.base, DiagonalNormal),
        }
    if isinstance(family, SparseNormal):
        pattern, key = family.pattern, f"pattern/{len(tensors)}"
        tensors[key] = torch.stack([pattern.rows, pattern.columns])
        return {"name": name, "dimension": pattern.dimension, "pairs": key}
    return {"name": name, **{field.name: getattr(family, field.name) for field in fields(family)}}  # type: ignore[arg-type]


def _decode_family(item: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> ExponentialFamily:
    options = {key: value for key, value in item.items() if key != "name"}
    if item["name"] == TransformedNormal.__name__:
        shape, diagonal = torch.Size(item["event_shape"]), bool(item.get("diagonal", False))
        family = pushforward_family(_decode(item["support"], tensors), shape, diagonal=diagonal)
        if family is None:
            raise ValueError(f"found support {item['support']}, expected one with a bijection from real vectors")
        return family
    if item["name"] == SparseNormal.__name__:
        return SparseNormal(Pattern(item["dimension"], *tensors[item["pairs"]].cpu()))
    known = {cls.__name__: cls for cls in _subclasses(ExponentialFamily)}
    if item["name"] not in known:
        raise ValueError(
            f"found family {item['name']!r}, expected one of {sorted(known)}; import the module that defines it first"
        )
    return known[item["name"]](**options)


def _subclasses(cls: type) -> list[type]:
    children: list[type] = cls.__subclasses__()
    return [item for child in children for item in (child, *_subclasses(child))]


def _encode(value: Any, tensors: dict[str, Tensor]) -> Any:
    """Numbers as they are; a constraint by its name, or its class and bounds; a tensor by its key."""
    if isinstance(value, Tensor):
        key = f"bound/{len(tensors)}"
        tensors[key] = value.detach().contiguous().clone()
        return {"tensor": key}
    if isinstance(value, list | tuple):
        return [_encode(item, tensors) for item in value]
    if not isinstance(value, constraints.Constraint):
        return value
    for name in _named_constraints():
        if getattr(constraints, name) is value:
            return {"constraint": name}
    if type(value).__name__ not in vars(_class_module(value)):
        raise ValueError(f"found support {value}, expected one of torch's or Pyro's constraints; it cannot be saved")
    return {
        "class": type(value).__name__,
        "options": {k: _encode(v, tensors) for k, v in vars(value).items()},
    }


def _decode(item: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(item, list):
        return [_decode(part, tensors) for part in item]
    if not isinstance(item, dict):
        return item
    if "tensor" in item:
        return tensors[item["tensor"]]
    if "constraint" in item:
        if item["constraint"] not in _named_constraints():
            raise ValueError(f"found support {item['constraint']!r}, expected one of torch's or Pyro's constraints")
        return getattr(constraints, item["constraint"])
    for module in (constraints, torch.distributions.constraints):
        cls = vars(module).get(item["class"])
        if isinstance(cls, type) and issubclass(cls, constraints.Constraint):
            return cls(**{key: _decode(value, tensors) for key, value in item["options"].items()})
    raise ValueError(f"found support of class {item['class']!r}, expected one of torch's or Pyro's constraints")


def _class_module(value: Any) -> Any:
    name = type(value).__name__
    return constraints if name in vars(constraints) else torch.distributions.constraints


def _named_constraints() -> list[str]:
    return [name for name in constraints.__all__ if isinstance(getattr(constraints, name), constraints.Constraint)]
