"""A page to try a model: upload a picture, ask, watch the answer appear, see the borders of the
picture's tokens. Or, with --api, an OpenAI-compatible chat completions API.

    pip install '.[serve]'
    beingvl serve --model stage-3/final     then open http://127.0.0.1:7860

    pip install '.[api]'
    beingvl serve --model stage-3/final --api     http://127.0.0.1:7860/v1

By default both listen on the loopback address. Neither they nor their pages contact other machines.
Uploads go into a temporary folder, which is removed at the end; Ctrl-C stops the server.
docs/how-to/serve.md shows how to call the API, and how to serve many users.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from beingvl.commands.options import add_model_arguments, options_of
from beingvl.errors import InputError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add_model_arguments(parser)
    add("--api", action="store_true", help="serve OpenAI's chat completions instead of the page")
    key = "file that holds the key of --api; default: the variable BEINGVL_API_KEY, else no key"
    add("--api_key", type=Path, metavar="FILE", help=key)
    backend = "what answers --api: this process, or a vLLM or llama.cpp server, by token ids"
    choices = ("transformers", "vllm", "llama.cpp")
    add("--backend", choices=choices, default=choices[0], help=backend)
    add("--backend_url", metavar="URL", help="that server's URL; default: its own default port")
    host = "address to listen on; any but a loopback address lets others use the model"
    add("--host", default="127.0.0.1", help=host)
    add("--port", type=int, default=7860, help="port to listen on; 0 takes a free one")
    upload = "largest picture file, or request to --api, in MB"
    add("--max_upload_megabytes", type=int, default=20, help=upload)
    add("--max_images", type=int, default=8, help="most pictures in one request to --api")
    add("--max_new_tokens", type=int, default=128, help="longest answer, in tokens")
    add("--max_seconds", type=int, default=300, help="time limit of one request to --api")


def run(args: argparse.Namespace) -> None:
    # torch is imported here, so that --help is instant, and after a wrong key was reported.
    from beingvl.inference.api_key import read_key

    if args.api_key and not args.api:
        raise InputError("--api_key is for --api; the page has no key")
    key = read_key(args.api_key) if args.api else None
    from beingvl.inference.serve import serve

    serve(**{**options_of(args), "api_key": key})
