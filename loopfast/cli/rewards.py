"""The commands about rewards."""

from __future__ import annotations

import json
import os
from typing import Annotated

import typer
from rich.console import Console

from loopfast.cli.app import app
from loopfast.cli.options import Overrides, load
from loopfast.errors import ConfigError
from loopfast.system.libraries import quiet_libraries


@app.command(epilog="**Example:** `loopfast rewards aesthetic`")
def rewards(
    name: Annotated[
        str | None,
        typer.Argument(metavar="NAME", help="A reward, to show its options; default: all rewards."),
    ] = None,
) -> None:
    """List the rewards of the package, or show one with its options."""
    from loopfast.rewards.listing import all_rewards, one_reward

    Console().print(all_rewards() if name is None else one_reward(name))


@app.command(
    "serve-reward",
    epilog="**Example:** `loopfast serve-reward jpeg_compressibility --option quality=80 --port 8000`",
)
def serve_reward(
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="A reward of the package, or module:function.")
    ] = None,
    options: Annotated[
        list[str] | None,
        typer.Option(
            "--option", metavar="KEY=VALUE", help="An option of the reward. May be given several times."
        ),
    ] = None,
    config: Annotated[
        str | None,
        typer.Option(
            "--config",
            "-c",
            metavar="NAME|FILE",
            help="The total reward of a configuration, in place of NAME.",
        ),
    ] = None,
    overrides: Overrides = None,
    host: Annotated[
        str, typer.Option(metavar="HOST", help="Address to listen on; 0.0.0.0: all.")
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(metavar="N", min=0, max=65535, help="Port to listen on; 0: any free port.")
    ] = 8000,
    token_env: Annotated[
        str | None,
        typer.Option(
            metavar="VARIABLE", help="Environment variable with the token that requests must carry."
        ),
    ] = None,
    max_batch: Annotated[
        int, typer.Option(metavar="N", min=1, help="Largest number of images per request.")
    ] = 64,
    max_body: Annotated[int, typer.Option(metavar="MIB", min=1, help="Largest size of a request.")] = 64,
) -> None:
    """Serve a reward over HTTP to runs on other machines, whose configuration names the reward `http`.

    docs/reward-server.md describes the protocol, for other servers. Ctrl-C or SIGTERM ends the server after it has
    answered the current requests.
    """
    if (name is None) == (config is None):
        raise ConfigError("give the NAME of one reward, or --config")
    if name is not None:
        from loopfast.config import parse_config

        plain = json.dumps({"model": {"pretrained": "embedded"}, "reward": [{"name": name}]})
        changes = [*(f"reward.0.options.{option}" for option in options or []), *(overrides or [])]
        settings = parse_config(plain, changes, name=f"reward {name}")
    else:
        settings = load(str(config), overrides)
    token = None
    if token_env is not None and not (token := os.environ.get(token_env)):
        raise ConfigError(f"--token-env: the environment variable {token_env!r} is not set")
    quiet_libraries()
    from loopfast.rewards import build_rewards
    from loopfast.rewards.serve import reward_app, serve_rewards

    rewards = build_rewards(settings.reward)
    app = reward_app(rewards, token=token, max_batch=max_batch, max_body=max_body * 2**20)
    titles = ", ".join(term.title for term in settings.reward)
    serve_rewards(app, host=host, port=port, say=lambda text: print(f"{titles}: {text}", flush=True))
