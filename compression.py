"""Scale compression (SCM): which tokens of an image's detailed tiles a language model needs to see.

The adaptive tiles, the thumbnail and the text after an image say what matters in it: the detailed tokens that get the most
of their attention in an early layer of the language model are kept, the others are left out of the prompt. There is
nothing to train. Source: the paper (arXiv 2408.02034); the defects of its published code are not repeated. Other ways to
choose by these scores are in token_selection.py.

Deals with tensors only; a function that runs the language model up to the queries and keys of one layer (`attention_probe.py`)
is given to it:

    settings = CompressionSettings(keep_ratio=0.5, layer=1, num_layers=24)
    images = find_images(input_ids, attention_mask, tile_counts, image_token_id, tokens_per_tile, settings)
    kept, _ = kept_positions(embeddings, attention_mask, images, settings, probe)
    (embeddings,), attention_mask = pack((embeddings,), kept)

Shapes: B rows, N tokens of a row (padding counted), n tokens that are not padding, I images, D width, H heads, d width of one.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import isqrt
from numbers import Integral, Real

import torch

from .token_selection import Run, Selection, TileMap, coordinate_tokens


# Attention weights held at a time while scoring, in float32: 16 MiB, which stays in the caches of a processor.
BLOCK_ELEMENTS = 4 * 2**20

QUERY_SETS = ("all", "visual", "balanced", "question", "last")
TILE_ORDERS = ("detailed_first", "adaptive_first")


@dataclass(frozen=True)
class AttentionInputs:
    """What goes into the attention of one layer for one sequence.

    query (H, n, d) and key (key/value heads, n, d) after rotation; `softcap`, `sliding_window` and `sinks` (H,) where the
    layer has them. `mask` (1 or H, n, n) says which token sees which, as bool or as what is added to the logits; None: every
    token sees itself and those before it, within the window.
    """

    query: torch.Tensor
    key: torch.Tensor
    scaling: float
    softcap: float | None = None
    sliding_window: int | None = None
    sinks: torch.Tensor | None = None
    mask: torch.Tensor | None = None


@dataclass(frozen=True)
class ImageSpan:
    """Where the tokens of an image are in its row, counted without padding; every range ends before its `stop`.

    Queries among the text end before `query_stop`, those of the question before `question_stop`. `tile_map` says how the
    detailed tiles lie, or just how many there are.
    """

    start: int
    stop: int
    detailed_start: int
    detailed_stop: int
    query_stop: int
    question_stop: int
    thumbnail_start: int
    tile_map: TileMap

    @property
    def detailed_tokens(self) -> int:
        return self.detailed_stop - self.detailed_start


@dataclass(frozen=True)
class CompressionSettings:
    """What one call of SCM is asked to do; raises `ValueError` for values that cannot work.

    Args:
        keep_ratio: Share of an image's detailed tokens that stay.
        layer: The layer of the language model whose attention scores them.
        num_layers: Number of its layers.
        queries: "all" scores with an image's own other tokens and all text after it, in one pass over the row. "visual"
            scores each image's tokens as a sequence of their own: the result depends on nothing but the image. "question"
            scores with the text from the image to the end of its message, "last" with the last token before the answer,
            "balanced" with the adaptive tiles, the thumbnail and the question, each counted as one; in "question" and
            "balanced" every token has one vote, however much it attends elsewhere.
        query_ends: For each image the index into its padded row before which its queries end; None is the row's end.
        tile_order: Whether an image's detailed or its adaptive tiles come first.
        selection: How the tokens that stay are chosen by their scores; by default as published.
        end_ids: Tokens that end a message.
    """

    keep_ratio: float
    layer: int
    num_layers: int
    queries: str = "all"
    query_ends: list[int] | None = None
    tile_order: str = "detailed_first"
    selection: Selection = Selection()
    end_ids: tuple[int, ...] = ()

    def __post_init__(self):
        if isinstance(self.keep_ratio, bool) or not isinstance(self.keep_ratio, Real) or not 0 < self.keep_ratio <= 1:
            raise ValueError(f"scm_keep_ratio must be above 0 and at most 1, got {self.keep_ratio!r}.")
        if isinstance(self.layer, bool) or not isinstance(self.layer, int) or not 0 <= self.layer < self.num_layers:
            raise ValueError(
                f"scm_layer {self.layer!r} does not exist; the language model has the layers 0 to {self.num_layers - 1} (1 "
                "is the published one)."
            )
        if self.queries not in QUERY_SETS:
            raise ValueError(f"scm_queries must be one of {', '.join(QUERY_SETS)}, got {self.queries!r}.")
        if self.tile_order not in TILE_ORDERS:
            raise ValueError(f"tile_order is 'detailed_first' or 'adaptive_first', got {self.tile_order!r}.")

    @property
    def compresses(self) -> bool:
        """Whether any token is to be left out."""
        return self.keep_ratio < 1 or self.selection.mass is not None or self.selection.blank == "save"


NO_COMPRESSION = CompressionSettings(keep_ratio=1.0, layer=0, num_layers=1)


def find_images(
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    tile_counts: torch.Tensor,
    image_token_id: int,
    tokens_per_tile: int,
    settings: CompressionSettings,
    tile_grids: torch.Tensor | None = None,
    is_whole: bool = True,
) -> list[list[ImageSpan]]:
    """Find the images of each row by the tokens that stand for them.

    Args:
        input_ids, attention_mask: (B, N), padded on either side.
        tile_counts: (I, 3) detailed, adaptive and thumbnail tiles of each image, in the order of the prompt.
        tile_grids: (I, 4) columns and rows of the detailed and of the adaptive grid of each image; only for selections
            that must know how tiles lie.
        is_whole: Whether the tokens of an image stand together; those of slices have text between them.

    Raises:
        ValueError: Counts that do not fit the image tokens, or an image that is spread over rows or masked.
    """
    counts, ends = _check_images(tile_counts, settings.query_ends, input_ids.shape[1])
    rows, columns = (input_ids == image_token_id).nonzero().cpu().unbind(1)
    expected = tokens_per_tile * sum(map(sum, counts))
    if len(rows) != expected:
        raise ValueError(
            f"The prompt has {len(rows)} image tokens (id {image_token_id}), but tile_counts {counts} stand for "
            f"{expected} ({tokens_per_tile} a tile)."
        )
    unpadded = attention_mask.bool().cpu().long().cumsum(dim=1)  # tokens up to and with each position
    images: list[list[ImageSpan]] = [[] for _ in input_ids]
    next_token = 0
    for number, (tiles, end) in enumerate(zip(counts, ends)):
        detailed, adaptive, thumbnail = (tokens_per_tile * count for count in tiles)
        tokens = slice(next_token, next_token + detailed + adaptive + thumbnail)
        next_token = tokens.stop
        if tokens.start == tokens.stop:
            continue
        row, first, last = int(rows[tokens.start]), int(columns[tokens.start]), int(columns[tokens.stop - 1])
        is_together = not is_whole or last - first == tokens.stop - tokens.start - 1
        if int(rows[tokens.stop - 1]) != row or not is_together:
            raise ValueError(f"The tokens of image {number} do not stand together in one row; check tile_counts.")
        if not attention_mask[row, first : last + 1].bool().all():
            raise ValueError(f"attention_mask hides tokens of image {number}.")
        if end <= last:
            raise ValueError(f"scm_query_ends[{number}] is {end}; it must lie after the image, which ends at {last}.")
        start, stop = int(unpadded[row, first]) - 1, int(unpadded[row, last])
        detailed_start = start + (adaptive if settings.tile_order == "adaptive_first" else 0)
        tile_map = TileMap(1, tiles[0], isqrt(tokens_per_tile))
        if settings.selection.needs_grid and tiles[0]:
            tile_map = _tile_map(number, tile_map, tile_grids, settings.selection)
        question_end = next(
            (i for i in range(last + 1, end) if settings.end_ids and int(input_ids[row, i]) in settings.end_ids), end
        )
        query_stop, question_stop = int(unpadded[row, end - 1]), int(unpadded[row, question_end - 1])
        bounds = (start, stop, detailed_start, detailed_start + detailed, query_stop, question_stop, stop - thumbnail)
        images[row].append(ImageSpan(*bounds, tile_map))
    return images


def _tile_map(number: int, column: TileMap, tile_grids: torch.Tensor | None, selection: Selection) -> TileMap:
    """Return how the detailed tiles of an image lie, given them one below the other."""
    asked = "shape" if selection.shape != "token" else "blank"
    asked = f"scm_select with {asked}={getattr(selection, asked)!r}"
    if tile_grids is None:
        raise ValueError(
            f"{asked} needs to know how tiles lie: pass tile_grids (images, 4), "
            "which the processor returns beside tile_counts."
        )
    columns, rows = torch.as_tensor(tile_grids)[number, :2].tolist()
    if columns * rows != column.rows:
        raise ValueError(
            f"Image {number} has {column.rows} detailed tiles, but its grid has {columns} x {rows}; {asked} needs all tiles of "
            "a grid (drop_blank=False)."
        )
    return TileMap(columns, rows, column.side)


def _check_images(
    tile_counts: torch.Tensor, query_ends: list[int] | None, length: int
) -> tuple[list[list[int]], list[int]]:
    """Return the tiles of each image, and where its queries end in a row of this length: at the row's end by default."""
    tiles = torch.as_tensor(tile_counts)
    is_integer = not tiles.is_floating_point() and tiles.dtype != torch.bool
    if tiles.ndim != 2 or tiles.shape[1] != 3 or not is_integer or (tiles < 0).any():
        raise ValueError(
            "tile_counts must hold the detailed, adaptive and thumbnail tiles of each image, integers of shape "
            f"(images, 3), got {tiles.dtype} of shape {tuple(tiles.shape)}: {tiles.tolist()}."
        )
    ends = [length] * len(tiles) if query_ends is None else query_ends
    if len(ends) != len(tiles):
        raise ValueError(f"scm_query_ends has {len(ends)} entries for {len(tiles)} images.")
    if not all(isinstance(end, Integral) and not isinstance(end, bool) and end <= length for end in ends):
        raise ValueError(f"scm_query_ends must be integers of at most {length}, the length of a row, got {ends!r}.")
    return tiles.tolist(), [int(end) for end in ends]


def kept_positions(
    embeddings: torch.Tensor,
    attention_mask: torch.Tensor,
    images: list[list[ImageSpan]],
    settings: CompressionSettings,
    probe: Callable[[torch.Tensor, torch.Tensor], AttentionInputs],
    rotary: Callable[[int], tuple[torch.Tensor, torch.Tensor]] | None = None,
    blank: list[list[torch.Tensor]] | None = None,
) -> tuple[list[torch.Tensor], list[list[Run]]]:
    """Return the positions of each row that stay: all but the detailed tokens that get the least attention.

    Each row is scored without its padding and by itself, so that a batch keeps what its rows keep alone.

    Args:
        embeddings: (B, N, D)
        attention_mask: (B, N)
        images: The images of each row, see `find_images`.
        probe: Returns the attention inputs of the scoring layer for the embeddings (n, D) of a sequence and a mask (n,) of
            its image tokens.
        rotary: Returns the mean cosine and sine (n,) of the rotary angles of that many positions; for selections that keep
            coordinates.
        blank: For each image of `images` which of its detailed tokens (their number,) show nothing; for selections that ask.

    Returns:
        For each row ascending int64 indices into the padded row, padding left out; and the runs that one kept token stands
        for, (its index, first, stop), also in the padded row.

    Raises:
        ValueError: Nothing comes after an image, so there is nothing to score with; or blank tokens are not known.
    """
    if blank is None and settings.selection.blank != "scored" and any(images):
        raise ValueError(f"scm_select with blank={settings.selection.blank!r} needs the pixels of the images.")
    kept, runs, select = [], [], settings.selection.select
    for row, (row_embeddings, mask, row_images) in enumerate(zip(embeddings, attention_mask, images)):
        positions = mask.nonzero().squeeze(1)  # (n,)
        stays = torch.ones_like(positions, dtype=torch.bool)
        numbered = enumerate(row_images) if settings.compresses else []
        compressible = {number: image for number, image in numbered if image.detailed_tokens}
        marked: list[Run] = []
        if compressible and select is None:
            unpadded = row_embeddings  # whole rows are not copied
            if len(positions) < len(row_embeddings):
                unpadded = row_embeddings[positions.to(embeddings.device)]
            scores = _score(unpadded, row_images, settings, probe)
        for number, image in compressible.items():
            is_blank = None if blank is None else blank[row][number].to(embeddings.device)
            saved = int(is_blank.sum()) if is_blank is not None and settings.selection.blank == "save" else 0
            count = int((image.detailed_tokens - saved) * settings.keep_ratio)
            if select is not None:
                chosen = torch.as_tensor(select(row, image.detailed_tokens, count), dtype=torch.long)
            else:
                coordinates = None
                if settings.selection.coordinates:
                    detailed = slice(image.detailed_start, image.detailed_stop)
                    angles = (mean[detailed].to(scores[image].device) for mean in rotary(len(positions)))
                    share, per_tile = settings.selection.coordinates, image.tile_map.side**2
                    coordinates = coordinate_tokens(*angles, per_tile, share)
                chosen, own = settings.selection.choose(scores[image], image.tile_map, count, coordinates, is_blank)
                chosen = torch.cat([chosen, chosen.new_tensor([last for last, _, _ in own])])
                first = image.detailed_start
                marked += [tuple(int(positions[first + i]) for i in (last, a, b - 1)) for last, a, b in own]
            stays[image.detailed_start : image.detailed_stop] = False
            stays[image.detailed_start + chosen.to(stays.device)] = True
        kept.append(positions[stays])
        runs.append([(place, first, last + 1) for place, first, last in marked])
    return kept, runs


def _score(
    embeddings: torch.Tensor,
    images: list[ImageSpan],
    settings: CompressionSettings,
    probe: Callable[[torch.Tensor, torch.Tensor], AttentionInputs],
) -> dict[ImageSpan, torch.Tensor]:
    """Return the score of the detailed tokens of each image of a row (n, D), (detailed tokens,) in float32."""
    compressible = [image for image in images if image.detailed_tokens]
    if settings.selection.score == "features":
        return {
            image: embeddings[image.detailed_start : image.detailed_stop].float().norm(dim=-1) for image in compressible
        }
    is_image = torch.zeros(len(embeddings), dtype=torch.bool)
    for image in images:
        is_image[image.start : image.stop] = True
    queries = {image: _queries(image, is_image, settings.queries) for image in compressible}
    is_image = is_image.to(embeddings.device)
    inputs = probe(embeddings, is_image) if settings.queries != "visual" else None
    scores = {}
    for image, groups in queries.items():
        first = 0
        if settings.queries == "visual":
            first, tokens = image.start, slice(image.start, image.stop)
            inputs = probe(embeddings[tokens], is_image[tokens])
        block = slice(image.detailed_start - first, image.detailed_stop - first)
        votes = settings.queries in ("balanced", "question")
        received = [attention_received(inputs, block, positions - first, votes) for positions in groups]
        scores[image] = received[0] if len(received) == 1 else torch.stack(received).mean(dim=0)
    return scores


def _queries(image: ImageSpan, is_image: torch.Tensor, query_set: str) -> list[torch.Tensor]:
    """Return the positions that score an image, in groups that count alike, among those that see it: its own, and text."""
    if query_set == "last":
        groups = [torch.tensor([image.query_stop - 1])]
    elif query_set in ("all", "visual"):
        stop = image.stop if query_set == "visual" else image.query_stop
        scores_it = ~is_image[:stop]
        scores_it[image.start : image.stop] = True
        groups = [scores_it[image.detailed_stop :].nonzero().squeeze(1) + image.detailed_stop]
    else:
        # The first token after an image only says that it ends.
        question = (~is_image[: image.question_stop])[image.stop + 1 :].nonzero().squeeze(1) + image.stop + 1
        adaptive = torch.arange(image.detailed_stop, image.thumbnail_start)
        thumbnail = torch.arange(max(image.thumbnail_start, image.detailed_stop), image.stop)
        groups = [question] if query_set == "question" else [adaptive, thumbnail, question]
    groups = [group for group in groups if len(group)]
    if not groups:
        raise ValueError(
            f"No token that scm_queries={query_set!r} counts comes after the detailed tiles of an image, so they cannot be "
            "compressed; the image needs a thumbnail, or the prompt text after it."
        )
    return groups


def attention_received(
    inputs: AttentionInputs, block: slice, queries: torch.Tensor, has_one_vote: bool = False
) -> torch.Tensor:
    """Compute the mean softmax attention, over heads and queries, that each key of a block gets.

    Attention is causal, and a share of all keys, not of the block, unless each query `has_one_vote` for the block. Computed
    in blocks of queries in float32, so that memory does not grow with heads x n x n.

    Args:
        inputs: Of n tokens.
        block: The keys that are scored.
        queries: (Q,) ascending positions that score them, int64 on the CPU.

    Returns:
        (keys of the block,) in float32.
    """
    heads, key = inputs.query.shape[0], inputs.key.float()
    groups = heads // key.shape[0]
    total = torch.zeros(block.stop - block.start, device=key.device)
    for positions in queries.split(max(1, BLOCK_ELEMENTS // (heads * key.shape[1]))):
        visible = int(positions[-1]) + 1
        positions = positions.to(key.device)
        query = inputs.query[:, positions].float() * inputs.scaling  # (H, Q', d)
        query = query.unflatten(0, (-1, groups)).flatten(1, 2)  # (kv heads, groups * Q', d)
        logits = query @ key[:, :visible].transpose(1, 2)
        if inputs.softcap is not None:
            logits = torch.tanh(logits / inputs.softcap) * inputs.softcap
        logits = logits.unflatten(1, (groups, -1)).flatten(0, 1)  # (H, Q', visible)
        if inputs.mask is None:
            distance = positions[:, None] - torch.arange(visible, device=key.device)
            is_hidden = distance < 0
            if inputs.sliding_window is not None:
                is_hidden |= distance >= inputs.sliding_window
            logits = logits.masked_fill_(is_hidden, -torch.inf)
        else:
            mask = inputs.mask[:, positions, :visible]
            logits = logits.masked_fill_(~mask, -torch.inf) if mask.dtype == torch.bool else logits.add_(mask)
        if has_one_vote:  # and none if it sees nothing of the block
            total += logits[..., block].softmax(dim=-1).nan_to_num_(0).sum(dim=(0, 1))
            continue
        normaliser = logits.logsumexp(dim=-1, keepdim=True)
        if inputs.sinks is not None:
            normaliser = torch.logaddexp(normaliser, inputs.sinks.float().view(-1, 1, 1))
        total += (logits[..., block] - normaliser).exp_().sum(dim=(0, 1))
    return total / (heads * len(queries))


def pack(tensors: tuple[torch.Tensor, ...], kept: list[torch.Tensor]) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Pack the kept positions of each row, padded with zeros on the left.

    Args:
        tensors: Each (B, N, ...)
        kept: For each row the positions that stay.

    Returns:
        The shorter tensors (B, M, ...) and their attention mask (B, M), M being the length of the longest row.
    """
    length = max(map(len, kept))
    device = tensors[0].device
    mask = torch.zeros(len(kept), length, dtype=torch.long, device=device)
    packed = [tensor.new_zeros(len(kept), length, *tensor.shape[2:]) for tensor in tensors]
    for row, positions in enumerate(kept):
        first = length - len(positions)
        mask[row, first:] = 1
        for short, tensor in zip(packed, tensors):
            short[row, first:] = tensor[row, positions.to(device)]
    return packed, mask
