"""Mixed requests to an engine, in one process or, as a module of `dsjax.launch`, in several.

    python -m dsjax.launch --processes 2 --module followed RUN LAYOUT SETTINGS COUNTED_STEPS WARM_UP

writes `found.json`, what the first process has seen, and for each process what its engine has done.
"""

import json
import sys
from dataclasses import asdict
from pathlib import Path

from dsjax.parallel.hosts import errors_of_process, start


def answers(engine):
    """What comes of all kinds of requests, in a form that JSON keeps: ids, texts, why they ended, log-probabilities."""
    from engines import GREEDY, MIX, prompt

    from dsjax.inference.sampling import Sampling

    mixed = [engine.submit(ids, how, max_tokens=count, stop_ids=[]) for ids, how, count in MIX]
    engine.step()
    dropped = [engine.submit(prompt(9, i), Sampling(seed=i), max_tokens=40, stop_ids=[]) for i in range(3)]
    texts = [engine.submit(text, Sampling(seed=5), max_tokens=20) for text in ("def add", "größer", "")]
    for request, steps in zip(dropped, (0, 1, 6), strict=True):
        for _ in range(steps):
            engine.step()
        engine.cancel(request)
    engine.run()
    # Stops are texts that come: within a word, and over several tokens.
    stops = [request.text[i : i + 3] for i, request in enumerate(texts, 4)]
    stopped = [engine.submit(text, Sampling(seed=5), max_tokens=20, stop=stops) for text in ("def add", "größer", "")]
    again = engine.submit(prompt(37, 5), GREEDY, max_tokens=8, stop_ids=[8, 9])
    engine.run()
    requests = [*mixed, *dropped, *texts, *stopped, again]
    return {
        "ids": [[token.id for token in request.tokens] for request in requests],
        "texts": [request.text for request in requests],
        "finish": [request.finish for request in requests],
        "cached": [request.cached_tokens for request in requests],
        "logprobs": [[token.logprob, *token.likeliest] for request in requests for token in request.tokens],
    }


def done(engine):
    """What an engine has done, which the requests alone decide."""
    pools = [engine.pages_held, engine.pages_idle, engine.running, engine.waiting]
    moved = engine.rebalancer.moved if engine.rebalancer else 0
    return {"counts": asdict(engine.counts), "prefix": asdict(engine.prefix), "pools": pools, "moved": moved}


def main(run, layout, settings, counted_steps, warm_up):
    """Answer as this process' part of a unit."""
    import jax

    from dsjax import Engine, EngineSettings, load_model
    from dsjax.inference import passes, words
    from dsjax.inference.layout import Layout
    from dsjax.parallel.agreement import global_state

    passes.COUNTED_STEPS = int(counted_steps)
    words._FOLDER = 4
    settings = EngineSettings(**json.loads(settings))
    model = load_model(run, layout=Layout(**json.loads(layout)), mtp=settings.speculate > 0)
    engine = Engine(model, settings)
    if engine.leads:
        if warm_up == "True":
            engine.warm_up()
        found = answers(engine)
        # Words are deleted soon after all have heard them, and in the end all of them.
        assert 0 < len(global_state.client.key_value_dir_get("dsjax/engine/")) < 4 * words._FOLDER < engine.counts.steps
        engine.close()
        Path("found.json").write_text(json.dumps(found))
        assert not global_state.client.key_value_dir_get("dsjax/engine/")
    else:
        engine.follow()
    Path(f"done{jax.process_index()}.json").write_text(json.dumps(done(engine)))


if __name__ == "__main__":
    start()
    with errors_of_process():
        main(*sys.argv[1:])
