"""The peak of intermediate results, against peaks counted by hand."""

import jax
import jax.numpy as jnp
import pytest

from dsjax.planning.liveness import peak

N = 64
SQUARE = 4 * N * N


def peak_of(function, *arguments, scopes=()):
    return peak(jax.make_jaxpr(function)(*arguments).jaxpr, scopes)


@pytest.fixture
def x():
    return jnp.zeros((N, N))


def test_products_are_in_memory_until_they_are_last_read(x):
    def chain(x):
        for _ in range(5):
            x = x @ x
        return x

    def all_at_the_end(x):
        powers = [x @ x for _ in range(5)]
        return sum(power @ power for power in powers)

    assert peak_of(chain, x).nbytes == 2 * SQUARE  # one is read, the next is made; the last is a result
    # Five powers, of which the last product reads one while four products of the others wait.
    assert peak_of(all_at_the_end, x).nbytes == 6 * SQUARE


def test_elementwise_operations_are_nowhere_in_memory(x):
    def elementwise(x):
        return jnp.sin(jnp.exp(x) + jnp.cos(x)).sum()

    def between_products(x):
        y = x @ x
        return jnp.sin(jnp.exp(y) * 2) @ y  # what a product reads is there, what it is made from is not

    assert peak_of(elementwise, x).nbytes == 0
    assert peak_of(between_products, x).nbytes == 2 * SQUARE


def test_what_a_while_reads_stays_and_what_it_holds_is_in_place(x):
    def turns(x):
        read, held = x @ x, x @ x.T

        def turn(state):
            turn, y = state
            return turn + 1, ((y @ x) @ x + y @ x) @ read

        return jax.lax.while_loop(lambda state: state[0] < 3, turn, (0, held))

    # What it reads; two products, and their sum for the last. What it holds is the memory of the result.
    assert peak_of(turns, x).nbytes == 4 * SQUARE


def test_a_loop_goes_on_with_the_memory_it_begins_with(x):
    def accumulate(x):
        def add(total, y):
            return total + y @ x, None

        total, _ = jax.lax.scan(add, x @ x, jnp.stack([x] * 7))
        return (total @ x).sum()

    # The total, the product that is added to it, seven squares in a stack.
    assert peak_of(accumulate, x).nbytes == 9 * SQUARE


def test_the_larger_branch_counts(x):
    def branch(x, predicate):
        def large(x):
            return (x @ x) @ (x @ x)

        return jax.lax.cond(predicate, large, lambda x: x, x) @ x

    # Two products inside, and room for the result of the conditional.
    assert peak_of(branch, x, True).nbytes == 3 * SQUARE + 4  # and the predicate as a number


def test_an_update_is_in_place(x):
    def update(x):
        buffer = x @ x
        buffer = jax.lax.dynamic_update_slice(buffer, jnp.ones((1, N)), (0, 0))
        buffer = jax.lax.optimization_barrier(buffer)
        return (buffer @ x).sum()

    assert peak_of(update, x).nbytes == 2 * SQUARE


def test_what_a_conditional_gives_back_is_in_place(x):
    def totals(x, total):
        total = jax.lax.cond(x[0, 0] > 0, lambda: total + x @ x, lambda: total)
        return total + x @ (x @ x)

    # Two products; the total is in the memory of an argument, and the result too.
    assert peak_of(totals, x, x).nbytes == 2 * SQUARE


def test_scopes_divide_the_peak(x):
    def scoped(x):
        with jax.named_scope("dispatch"):
            sent = x @ x
        computed = x @ x
        return sent @ computed

    found = peak_of(scoped, x, scopes=("combine", "dispatch"))
    assert (found.nbytes, found.by_scope) == (2 * SQUARE, {"dispatch": SQUARE, "": SQUARE})
