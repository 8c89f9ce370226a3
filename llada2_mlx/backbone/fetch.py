"""A smaller copy of a hub model, made while the model arrives: never more than three of its files lie on the disk.

Quantising knows no more than a row, so a tensor gives by itself what it gives in its layer's stack. That is why a file of
the model can be used up at once, whichever layers it has parts of: what becomes of its tensors is kept in pieces, one for
each layer, until a layer has all of them.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Generator
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..checkpoint.copies import STATE, alone, state_of, writing
from ..checkpoint.hub import Arriving, again, cached, is_id
from ..checkpoint.layout import (
    FILES,
    INDEX,
    WEIGHTS,
    Checkpoint,
    Part,
    TensorInfo,
    check_tensors,
    patterns,
    resolve,
    safetensors_header,
)
from ..errors import CheckpointError, RequestError
from ..files import summed, write_json
from ..progress import OnStep, Progress, ignore
from ..worker import MLXWorker
from .convert import (
    begin,
    block_of,
    convert,
    finish,
    groups_of,
    is_current,
    is_whole,
    kept,
    layer_name,
    made_by,
    require_place,
    save,
    size_of,
    source_of,
)
from .precision import BITS, check_block
from .weights import EIGHT, SCALE, Reader, check_file, from_eight, names_of, scaled_by, shapes_of

MOST_FILES = 3  # of the model that lie on the disk at one time, beside the copy


def needs_fetching(model: str, precision: str) -> bool:
    """Whether a hub model is asked for with few bits, and nothing of its backbone that would do is here."""
    if precision not in BITS or os.path.isdir(os.path.expanduser(model)) or not is_id(model):
        return False
    here = cached(model)
    try:
        return here is None or bool(Checkpoint(here).missing(Part.BACKBONE))
    except CheckpointError:  # an index that says nothing
        return True


def fetch_copy(repo: str, bits: int, on_step: OnStep = ignore, later: Collection[Part] = ()) -> Checkpoint:
    """Get a hub model's backbone with few bits into the hub's cache; its own weights come and go file by file.

    The copy is the one that ``convert`` would make, byte for byte, and lies where the model would look for it: inside its
    folder. Where the weights are here already, they are converted and stay; those of a download that was not finished are
    used up. Stopped anywhere, the next call goes on, and fetches nothing again that is converted.

    Args:
        repo: the hub id.
        bits: 4, 6 or 8.
        on_step: called in this thread; what it raises ends the work, and what is done is kept.
        later: parts that are to be fetched afterwards: the hub has to have them, and the disk room for them.

    Returns:
        The model's folder.

    Raises:
        RequestError: there are no such bits, the model is quantised to others, or something is in the copy's place.
        CheckpointError: the model cannot be had, see ``hub.download``, or does not fit its config.
        LLaDA2Error: another program is doing the same, or the copy cannot be written.
    """
    worker, here = MLXWorker(), cached(repo)
    if here is not None and (found := _found(Checkpoint(here), bits, worker, on_step)):
        return found
    arriving = Arriving(
        repo,
        patterns(Part.BACKBONE),
        used=WEIGHTS,
        needed=[pattern for part in (Part.BACKBONE, *later) for pattern in FILES[part]],
        lacking=f"The language model of {repo} is not on this machine with {bits} bits",
        on_step=on_step,
    )
    checkpoint = Checkpoint(arriving.folder)
    if checkpoint.quantization is not None:
        stated = check_block(checkpoint.quantization, f"{checkpoint.root / 'config.json'}")["bits"]
        if stated != bits:
            raise RequestError(
                f"{repo} is quantised to {stated} bits, and the lost precision cannot be restored. Choose auto, or the "
                "model that it was made of."
            )
        return resolve(repo, Part.BACKBONE, on_step=on_step)
    if found := _found(checkpoint, bits, worker, on_step):  # of another revision
        return found
    copy = checkpoint.copy_folder(bits).resolve()
    require_place(copy)
    # two copies of one model would take each other's files away
    with alone(checkpoint.root / "model", "is being downloaded"), alone(copy):
        _Growing(arriving, checkpoint, copy, bits, worker, on_step).run()
    return checkpoint


def _found(checkpoint: Checkpoint, bits: int, worker: MLXWorker, on_step: OnStep) -> Checkpoint | None:
    """The checkpoint, if it has the copy or what it is made of; it is made then."""
    copy = checkpoint.copy_folder(bits)
    try:
        whole = not checkpoint.missing(Part.BACKBONE, published=True) and checkpoint.quantization is None
        current = not whole and is_current(copy, checkpoint, bits)
    except CheckpointError:  # there is no config, or an index that says nothing
        return None
    if whole:
        worker.drive(convert(checkpoint, copy, bits, replace=True), on_step)
    return checkpoint if whole or current else None


@dataclass(frozen=True)
class _Growing:
    """A copy that grows while its model arrives."""

    arriving: Arriving
    checkpoint: Checkpoint
    copy: Path
    bits: int
    worker: MLXWorker
    on_step: OnStep

    def run(self) -> None:
        with writing(self.copy):
            begin(self.copy, self._fits)
            if state_of(self.partial) is None:
                origin = {"quantization": self.block, "source": self._texts()}
                write_json(self.partial / STATE, origin | {"made": {}, "made_by": made_by()})
        self._check_index()
        waiting = [shard for shard in self.shards if not self._is_used(shard)]
        self._drop([shard for shard in self.shards if shard not in waiting])
        most = self._files_that_fit(waiting)
        self.worker.drive(self._assemble(), self.on_step)
        while waiting:
            waiting.sort(key=self.arriving.arrived, reverse=True)  # room is made before more is fetched
            now, waiting = waiting[:most], waiting[most:]
            used = sum(self.arriving.sizes[shard] for shard in self.shards if shard not in (*now, *waiting))
            self.arriving.fetch(now, self.on_step, before=used)
            for shard in now:
                self.worker.drive(self._use(shard), self.on_step)
                self._drop([shard])
                self.worker.drive(self._assemble(), self.on_step)
        with writing(self.copy):
            self._finish()

    def _drop(self, shards: list[str]) -> None:
        """Remove files that are used up, where they are still here."""
        self.arriving.drop([shard for shard in shards if self.arriving.arrived(shard)], self.on_step)

    @cached_property
    def partial(self) -> Path:
        """Where the copy grows."""
        return self.copy.with_name(f".{self.copy.name}.partial")

    @cached_property
    def block(self) -> dict[str, Any] | None:
        return block_of(self.checkpoint, self.bits)

    @cached_property
    def groups(self) -> list[list[tuple[str, tuple[int, ...]]]]:
        return groups_of(self.checkpoint.config)

    @cached_property
    def weight_map(self) -> dict[str, str]:
        """Tensor -> file, as the index has it; empty where there is no index, and one file has all."""
        return self.checkpoint.weight_map() if (self.checkpoint.root / INDEX).exists() else {}

    @cached_property
    def shards(self) -> list[str]:
        """The files that have the weights."""
        return sorted(set(self.weight_map.values())) if self.weight_map else list(self.arriving.sizes)

    @cached_property
    def group_of(self) -> dict[str, int]:
        """Tensor -> the group that it belongs to, in the order in which they are written."""
        return {
            each: number
            for number, parameters in enumerate(self.groups)
            for parameter, shape in parameters
            for name in names_of(parameter, shape, self.weight_map)
            for each in (name, name + SCALE)
        }

    @cached_property
    def contents(self) -> dict[str, list[int]]:
        """File -> the groups that it has tensors of."""
        if not self.weight_map:
            return {shard: list(range(len(self.groups))) for shard in self.shards}
        found: dict[str, set[int]] = {shard: set() for shard in self.shards}
        for name, shard in self.weight_map.items():
            if name in self.group_of:
                found[shard].add(self.group_of[name])
        return {shard: sorted(numbers) for shard, numbers in found.items()}

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the tensors that the index names."""
        return shapes_of(self.checkpoint.config, self.weight_map)

    def _fits(self, origin: dict[str, Any]) -> bool:
        """Whether what an earlier run has made is of this model."""
        source = origin.get("source")
        if origin.get("quantization") != self.block or not isinstance(source, dict):
            return False
        texts = {name: entry for name, entry in source.items() if name not in self.arriving.sizes}
        sizes = {name: entry[0] for name, entry in source.items() if name in self.arriving.sizes}
        return texts == self._texts() and sizes.items() <= self.arriving.sizes.items()

    def _texts(self) -> dict[str, Any]:
        """What a copy's state says of the files that stay."""
        return {name: entry for name, entry in source_of(self.checkpoint).items() if name not in self.arriving.sizes}

    def _check_index(self) -> None:
        """Refuse a model that does not fit its config, before its weights are fetched; as far as the index tells."""
        where = self.checkpoint.root / INDEX
        if not self.weight_map:
            if len(self.shards) != 1:
                raise CheckpointError(f"{self.checkpoint.root} has {len(self.shards)} weight files but no {INDEX}.")
            return
        if strange := [shard for shard in self.shards if shard not in self.arriving.sizes]:
            raise CheckpointError(f"{where} names {strange[0]}, which the hub does not have. {again(where)}")
        named = {name: TensorInfo(where, shape, "") for name, shape in self.shapes.items() if name in self.weight_map}
        check_tensors(named, self.shapes, where)

    def _files_that_fit(self, waiting: list[str]) -> int:
        """How many files the disk has room for at one time, beside the copy and what is fetched later.

        Raises:
            CheckpointError: not even for one.
        """
        lacking = sorted((self.arriving.sizes[shard] - self.arriving.arrived(shard) for shard in waiting), reverse=True)
        size = size_of(self.checkpoint.config, self.block)
        made = sum(path.stat().st_size for path in self.partial.glob("*.safetensors"))
        layer = 2 * size // len(self.groups)  # one is in pieces and whole for a moment; layers differ
        rest = max(size - made, 0) + layer + self.arriving.later
        for most in range(MOST_FILES, 1, -1):
            with suppress(CheckpointError):
                self.arriving.require_room(sum(lacking[:most]) + rest)
                return most
        self.arriving.require_room(sum(lacking[:1]) + rest)
        return 1

    def _layer(self, number: int) -> Path:
        return self.partial / layer_name(number + 1, len(self.groups))

    def _piece(self, number: int, shard: str) -> Path:
        return self.partial / f"piece-{number + 1:05d}-{self.shards.index(shard) + 1:05d}.safetensors"

    def _is_used(self, shard: str) -> bool:
        """Whether nothing in a file is needed any more."""
        noted = shard in state_of(self.partial)["source"]
        return noted and all(
            is_whole(self._layer(number)) or is_whole(self._piece(number, shard)) for number in self.contents[shard]
        )

    def _use(self, shard: str) -> Generator[Progress, None, None]:
        """Write what becomes of a file's tensors, in a piece for each layer."""
        path = self.checkpoint.root / shard
        if self.weight_map:
            named = self.weight_map
            tensors = check_file(self.shapes, [name for name, file in named.items() if file == shard], path)
        else:
            named, shapes = safetensors_header(path), shapes_of(self.checkpoint.config, safetensors_header(path))
            tensors = check_file(shapes, [*shapes, *(name for name in named if scaled_by(name) in shapes)], path)
        reader, groups = Reader(tensors), self.contents[shard]
        with writing(self.copy):
            state = state_of(self.partial)
            entry = [path.stat().st_size, summed(path)]
            write_json(self.partial / STATE, state | {"source": state["source"] | {shard: entry}})
            for done, number in enumerate(groups, 1):
                if not is_whole(self._layer(number)) and not is_whole(self._piece(number, shard)):
                    pieces: dict[str, mx.array] = {}
                    for parameter, shape in self.groups[number]:
                        for name in names_of(parameter, shape, named):
                            pieces |= self._converted(parameter, name, tensors, reader)
                        mx.eval(pieces)
                    save(self.partial, self._piece(number, shard).name, pieces)
                    del pieces
                    mx.clear_cache()
                yield Progress("converting", done, len(groups))

    def _converted(
        self, parameter: str, name: str, tensors: dict[str, TensorInfo], reader: Reader
    ) -> dict[str, mx.array]:
        """What becomes of a tensor; a float8 one and its scales wait for each other where they are in two files."""
        if name not in tensors:
            return {name + SCALE: reader.take(name + SCALE)} if name + SCALE in tensors else {}
        if tensors[name].dtype == EIGHT and name + SCALE not in tensors:
            return {name: reader.take(name)}
        found = kept(parameter, reader.read(name, tensors[name].shape, None), self.block)
        return {_renamed(key, parameter, name): value for key, value in found.items()}

    def _assemble(self) -> Generator[Progress, None, None]:
        """Write the layers that have all their pieces."""
        unused = {shard for shard in self.shards if not self._is_used(shard)}
        holders = {
            number: [shard for shard in self.shards if number in self.contents[shard]]
            for number in range(len(self.groups))
        }
        ready = [number for number in holders if not unused.intersection(holders[number])]
        with writing(self.copy):
            for done, number in enumerate(ready, 1):
                pieces = [self._piece(number, shard) for shard in holders[number]]
                if not is_whole(self._layer(number)):
                    save(self.partial, self._layer(number).name, self._assembled(number, pieces))
                    mx.clear_cache()
                for path in pieces:
                    path.unlink(missing_ok=True)
                yield Progress("converting", done, len(ready))

    def _assembled(self, number: int, paths: list[Path]) -> dict[str, mx.array]:
        """The tensors of a layer, from its pieces."""
        pieces: dict[str, mx.array] = {}
        for path in paths:
            pieces |= mx.load(str(path))
        tensors: dict[str, mx.array] = {}
        for parameter, shape in self.groups[number]:
            names = names_of(parameter, shape, pieces)
            parts = [self._part(parameter, name, pieces) for name in names]
            for key in parts[0]:
                tensors[key] = parts[0][key] if names == [parameter] else mx.stack([part[key] for part in parts])
            mx.eval(tensors)
        return tensors

    def _part(self, parameter: str, name: str, pieces: dict[str, mx.array]) -> dict[str, mx.array]:
        """What became of one tensor of a parameter, by the names that the parameter has in a copy."""
        if name + SCALE in pieces:
            value = from_eight(pieces.pop(name), pieces.pop(name + SCALE)).astype(mx.bfloat16)
            if not mx.isfinite(value).all().item():
                raise CheckpointError(
                    f"{self.checkpoint.root} holds values that are not finite (NaN or infinity) in {name}."
                )
            return kept(parameter, value, self.block)
        keys = [parameter, *(parameter.removesuffix("weight") + end for end in ("scales", "biases"))]
        own = {key: _renamed(key, parameter, name) for key in keys}
        return {key: pieces.pop(each) for key, each in own.items() if each in pieces}

    def _finish(self) -> None:
        """Note what the copy was made of just as ``convert`` does, and give it its place."""
        state, layers = state_of(self.partial), [self._layer(number) for number in range(len(self.groups))]
        made = {path.name: state["made"][path.name] for path in layers}
        source = dict(sorted(state["source"].items()))
        noted = {"quantization": self.block, "source": source, "made": made, "made_by": state["made_by"]}
        write_json(self.partial / STATE, noted)
        weight_map = {name: path.name for path in layers for name in safetensors_header(path)}
        finish(self.checkpoint, self.partial, self.copy, self.block, weight_map)


def _renamed(key: str, parameter: str, name: str) -> str:
    """What a parameter's weight, scales or offsets are called in a piece, which has them of one tensor ``name``."""
    return name.removesuffix("weight") + key.removeprefix(parameter.removesuffix("weight"))
