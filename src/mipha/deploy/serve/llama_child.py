"""llama.cpp's own server out of the wheel `xllamacpp`, as a program with the arguments of `llama-server` that we use.

A process of its own: where llama.cpp stops on a failed check, it takes its process with it.
"""

from __future__ import annotations

import argparse
import os
import sys


def main() -> None:
    """Serve until stdin ends, which it does with the process that started this one."""
    parser = argparse.ArgumentParser(
        prog="python -m mipha.deploy.serve.llama_child", description=__doc__
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--mmproj")
    parser.add_argument("--alias", required=True)
    parser.add_argument("--host", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--ctx-size", type=int, required=True)
    parser.add_argument("--parallel", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--jinja", action="store_true", required=True)
    options = parser.parse_args()

    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = options.model
    if options.mmproj:
        params.mmproj.path = options.mmproj
    params.model_alias = {options.alias}
    params.hostnames, params.port = [options.host], options.port
    params.api_keys = [os.environ["LLAMA_API_KEY"]]
    params.n_ctx, params.n_parallel = options.ctx_size, options.parallel
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = options.threads
    params.use_jinja = options.jinja
    params.ui = params.endpoint_props = params.endpoint_slots = False
    server = xllamacpp.Server(params)
    sys.stdin.read()
    del server


if __name__ == "__main__":
    main()
