"""Fits the gate by categories before the first step, where the answers are known: two small supervised problems.

    user half     embedding of a user → the categories that the user bans       from the users of the split
    prompt half   text states of a prompt → its category, none for a safe one   from the split's captions

An eighth of the users and of the prompts is left out at first, to say how often the gate is right about new ones; then
both halves are fitted on everything. The steps do not change the gate.

Where an embedding says what its user bans (the encoder features), every user is there several times more with further
bans of the user's own: else the gate would read the other attributes alone, from which the bans of all users follow.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from psa_jax.data.rows import NO_CATEGORY
from psa_jax.data.shards import Shards
from psa_jax.diffusion.conditioning import encode_text
from psa_jax.errors import PSAError
from psa_jax.interop.native import adapter_arrays, with_arrays
from psa_jax.models.gates import CategoryGate
from psa_jax.preference.batch import TOKENS
from psa_jax.profiles.own_bans import ban_columns
from psa_jax.profiles.schema import CATEGORIES
from psa_jax.profiles.table import EmbeddingTable
from psa_jax.prompt_columns import is_prompt
from psa_jax.training.optimizer import Arrays
from psa_jax.training.setup import Setup
from psa_jax.training.sharding import replicated
from psa_jax.training.state import Frozen

LEFT_OUT = 8
"""One in so many users and prompts is left out to measure."""
MOST_PROMPTS = 8192
"""Prompts that are looked at: their text states are in memory, 2.6 GB of SDXL's."""
COPIES, OWN_BAN_SHARE = 8, 0.3
"""How often a user is repeated with bans of the user's own, and the share of categories that are then banned."""
STEPS, BATCH, LEARNING_RATE, WEIGHT_DECAY = 600, 128, 3e-3, 1e-2


@dataclasses.dataclass(frozen=True)
class GateAccuracy:
    """How often the gate is right about what it was not fitted on, in percent.

    Attributes:
      users: of the pairs of user and category.
      own_bans: the same of users with bans of their own; None where embeddings do not say what their user bans.
      prompts: of the prompts: its own category and no other one for an unsafe prompt, none for a safe one.
    """

    users: float
    prompts: float
    own_bans: float | None = None


def fit_gates(
    setup: Setup, frozen: Frozen, params: Arrays, shards: Shards, table: EmbeddingTable, seed: int
) -> tuple[Arrays, GateAccuracy]:
    """Fits both halves of the gate.

    Every process of a group does the same and finds the same.

    Args:
      setup: with an adapter whose gate is that by categories.
      frozen: as `setup.frozen()` gives it.
      params: the adapter's arrays.
      shards: the rows to fit on.
      table: embeddings of their users.
      seed: of the order of examples.

    Returns:
      `params` with the fitted gate, and its accuracy on users and prompts that were left out.

    Raises:
      PSAError: too few users or prompts to leave some out, or unsafe prompts without a category.
    """
    if (shards.columns.categories[shards.columns.unsafe] == NO_CATEGORY).any():
        raise PSAError(
            f"{shards.folder}: the gate by categories needs the category of every unsafe prompt; {shards.split} has "
            "rows without. Add them, or set adapter.gate to attention and adapter.tokens to 8"
        )
    prompts, categories = _prompts_of(shards)
    users, states = _users_of(shards, table), _text_states(setup, frozen, prompts)
    count = {"user": len(users[0]), "prompt": len(states)}
    halves = {
        "user": (CategoryGate.ban_logits, *_with_own_bans(table, *users, seed)),
        "prompt": (CategoryGate.category_logits, states, categories, np.ones_like(categories)),
    }
    # Replicated first: matrices may be divided over the devices of other processes, too.
    whole = jax.device_get(jax.device_put(params, replicated(setup.mesh)))
    local = {name: jnp.asarray(array) for name, array in whole.items()}
    adapter, accuracy = with_arrays(setup.adapter, local), {}
    for half, (logits, inputs, labels, known) in halves.items():
        left_out = np.arange(len(labels)) % count[half] % LEFT_OUT == LEFT_OUT - 1  # a user with all copies
        if not left_out.any():
            raise PSAError(
                f"{shards.folder}: {count[half]} {half}s in {shards.split} are too few to fit a gate; use {LEFT_OUT} "
                "or more"
            )
        problem, rows = _Problem(logits, inputs, labels, known), np.flatnonzero(left_out)
        right, seen = problem.right(problem.fit(adapter.gate, np.flatnonzero(~left_out), seed), rows), known[left_out]
        usual = rows < count[half]
        accuracy[f"{half}s"] = _percent(right[usual][seen[usual]] if half == "user" else right.all(axis=1))
        if not usual.all():
            accuracy["own_bans"] = _percent(right[~usual][seen[~usual]])
        fitted = problem.fit(adapter.gate, np.arange(len(labels)), seed)
        setattr(adapter.gate, half, getattr(fitted, half))
    return jax.device_put(adapter_arrays(adapter), setup.state_sharding.params), GateAccuracy(**accuracy)


def _percent(right: Bool[np.ndarray, "..."]) -> float:
    return 100.0 * float(np.mean(right))


@dataclasses.dataclass(frozen=True, eq=False)
class _Problem:
    """One half of the gate: n inputs and whether each of the categories holds for them.

    Attributes:
      logits: (gate, inputs) → logits for each category.
      inputs: [n, …] of a float type.
      labels: [n, k].
      known: [n, k]: which labels are known; the others teach nothing.
    """

    logits: Callable[[CategoryGate, Array], Float[Array, "b k"]]
    inputs: Float[np.ndarray, "..."]
    labels: Bool[np.ndarray, "n k"]
    known: Bool[np.ndarray, "n k"]

    def fit(self, gate: CategoryGate, rows: Int[np.ndarray, " n"], seed: int) -> CategoryGate:
        """The gate after cross-entropy on these rows, in which rare categories count more."""
        graph, state = nnx.split(gate)
        optimizer = optax.adamw(optax.cosine_decay_schedule(LEARNING_RATE, STEPS), weight_decay=WEIGHT_DECAY)
        asked = np.maximum(self.known[rows].sum(axis=0), 1)
        shares = ((self.labels & self.known)[rows].sum(axis=0) / asked).clip(0.02, 0.98)
        positive = jnp.asarray(np.sqrt((1.0 - shares) / shares), jnp.float32)  # half of the way to equal weights

        def loss(state: nnx.State, inputs: Array, labels: Array, known: Array) -> Float[Array, ""]:
            found = self.logits(nnx.merge(graph, state), inputs.astype(jnp.float32))
            each = optax.sigmoid_binary_cross_entropy(found, labels.astype(jnp.float32))
            return jnp.mean(jnp.where(known, jnp.where(labels, positive[None], 1.0) * each, 0.0))

        @jax.jit
        def step(state: nnx.State, moments: Any, *batch: Array) -> tuple[nnx.State, Any]:
            gradient = jax.grad(loss)(state, *batch)
            with jax.numpy_dtype_promotion("standard"):  # optax multiplies Python floats and int32 counters
                updates, moments = optimizer.update(gradient, moments, state)
            return optax.apply_updates(state, updates), moments

        moments, order = optimizer.init(state), np.random.default_rng([seed, len(rows)])
        for _ in range(STEPS):
            batch = order.choice(rows, min(BATCH, len(rows)), replace=False)
            state, moments = step(state, moments, self.inputs[batch], self.labels[batch], self.known[batch])
        return nnx.merge(graph, state)

    def right(self, gate: CategoryGate, rows: Int[np.ndarray, " n"]) -> Bool[np.ndarray, "n k"]:
        """For each of these rows and each category, whether the gate says what holds."""
        graph, state = nnx.split(gate)
        found = jax.jit(lambda state, inputs: self.logits(nnx.merge(graph, state), inputs.astype(jnp.float32)))
        parts = np.array_split(rows, -(-len(rows) // BATCH))
        return np.concatenate([(np.asarray(found(state, self.inputs[p])) > 0) == self.labels[p] for p in parts])


def _users_of(
    shards: Shards, table: EmbeddingTable
) -> tuple[Float[np.ndarray, "n d"], Bool[np.ndarray, "n k"], Bool[np.ndarray, "n k"]]:
    """Embeddings of the users, what they ban, and of which categories that is known: those of their rows."""
    columns = shards.columns
    ids, numbers = np.unique(np.asarray(columns.user_ids), return_inverse=True)
    bans, known = np.zeros((2, len(ids), len(CATEGORIES)), np.bool_)
    bans[numbers[columns.banned], columns.categories[columns.banned]] = True
    said = columns.categories != NO_CATEGORY
    known[numbers[said], columns.categories[said]] = True
    return table.lookup([str(user) for user in ids]), bans, known


def _with_own_bans(
    table: EmbeddingTable,
    users: Float[np.ndarray, "n d"],
    bans: Bool[np.ndarray, "n k"],
    known: Bool[np.ndarray, "n k"],
    seed: int,
) -> tuple[Float[np.ndarray, "m d"], Bool[np.ndarray, "m k"], Bool[np.ndarray, "m k"]]:
    """The users of `_users_of`, and COPIES of all of them with bans of their own where the embeddings have a place."""
    columns = ban_columns(table)
    if columns is None:
        return users, bans, known
    added = np.random.default_rng(seed).random((COPIES, *bans.shape)) < OWN_BAN_SHARE
    added[:, np.arange(len(users)), np.arange(len(users)) % len(CATEGORIES)] = True  # everybody adds something
    ones = np.ones((1, table.dim), np.float32)
    stated = (ones if table.mean is None else table.apply(ones))[:, columns]
    copies = np.repeat(users[None], COPIES, axis=0)
    copies[:, :, columns] = np.where(added, stated[None], copies[:, :, columns])
    every = [(copies, users), (bans[None] | added, bans), (known[None] | added, known)]
    return tuple(np.concatenate([own, *repeated]) for repeated, own in every)


def _prompts_of(shards: Shards) -> tuple[dict[str, np.ndarray], Bool[np.ndarray, "n k"]]:
    """Distinct prompts over the whole split, as the columns of a batch, and the categories that each asks for."""
    first: dict[bytes, int] = {}
    rows, labels = [], []
    for number in range(len(shards)):
        row = shards[number]
        key = row["input_ids"].tobytes()
        if key not in first:
            first[key] = len(rows)
            rows.append({name: row[name] for name in row if is_prompt(name)})
            labels.append(np.zeros(len(CATEGORIES), np.bool_))
        if row["kind"]:
            labels[first[key]][int(row["category"])] = True
    kept = np.linspace(0, len(rows) - 1, min(MOST_PROMPTS, len(rows))).round().astype(int)
    return {name: np.stack([rows[i][name] for i in kept]) for name in rows[0]}, np.stack([labels[i] for i in kept])


def _text_states(setup: Setup, frozen: Frozen, prompts: dict[str, np.ndarray]) -> Float[np.ndarray, "n s c"]:
    """Text states of prompts on the host, in float16; those of the shards where the set-up uses them."""
    if setup.cached_text:
        return prompts["text_states"]
    names = TOKENS[: len(setup.model.text_encoders)]

    def encode(frozen: Frozen, ids: tuple[Array, ...]) -> Float[Array, "b s c"]:
        return encode_text(setup.frozen_model(frozen).text_encoders, ids).states.astype(jnp.float16)

    whole = replicated(setup.mesh)
    encode, count = jax.jit(encode, out_shardings=whole), len(prompts[names[0]])
    found = []
    for start in range(0, count, BATCH):
        rows = np.arange(start, start + BATCH).clip(max=count - 1)
        found.append(jax.device_get(encode(frozen, jax.device_put(tuple(prompts[n][rows] for n in names), whole))))
    return np.concatenate(found)[:count]
