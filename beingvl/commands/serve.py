"""A page to try a model: upload a picture, ask, watch the answer appear, see the borders of the
picture's tokens.

    pip install '.[serve]'
    beingvl serve --model stage-3/final --vbpe_path vbpe.json     then open http://127.0.0.1:7860

For one person at this machine: it listens on the loopback address, answers one question at a time,
and asks nothing of any other machine; its pages tell the browser to do the same. Uploads lie in a
temporary folder until it ends. Ctrl-C ends it. docs/Inference.md says how to serve many.
"""

from __future__ import annotations

import argparse

from beingvl.commands.options import add_model_arguments, options_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add_model_arguments(parser)
    host = "address to listen on; any other than this machine's own lets others use the model"
    add("--host", default="127.0.0.1", help=host)
    add("--port", type=int, default=7860, help="port to listen on; 0 takes a free one")
    add("--max_upload_megabytes", type=int, default=20, help="largest picture file, in MB")
    add("--max_new_tokens", type=int, default=128, help="longest answer, in tokens")


def run(args: argparse.Namespace) -> None:
    # torch is imported here, so that --help is instant.
    from beingvl.inference.serve import serve

    serve(**options_of(args))
