"""`python -m fedproxy.compress`: make a proxy and measure its fidelity, without a federation."""

from collections.abc import Sequence

from fedproxy.command import run_command

USAGE = """
usage: python -m fedproxy.compress recipe=NAME [key=value ...]

Compresses the target as the recipe says (and distils, where distillation.steps > 0), and writes into output_dir
proxy/ (what clients receive), server/layer_map.json, block_influence.png and report.json, .md, .html with the proxy's
fidelity: KL to the target and perplexity on held-out public text, parameters, tokens per second, and the scores of
target and proxy where evaluation.models lists them. fit with resume=auto on the same output_dir goes on from there.

examples:
  python -m fedproxy.compress recipe=fedproxy_tiny output_dir=runs/tiny_proxy
  python -m fedproxy.compress recipe=fedproxy_llama compression.name=angular evaluation.models=[] output_dir=runs/run
  python -m fedproxy.compress recipe=fedproxy_llama target.path=./my_llm compression.ratio=0.5 output_dir=runs/mine
  python -m fedproxy.compress recipe=fedproxy_llama compression.keep=[0,1,2,27,28,29] output_dir=runs/by_hand

docs/compression.md says which compressor does what.
"""


def main(arguments: Sequence[str]) -> None:
    """Compress the target of the recipe that the arguments describe, and print where the report lies."""
    from fedproxy.config import load_config

    config = load_config(arguments)
    from fedproxy.pipeline.run import compress_only

    compress_only(config)
    print(f"proxy: {config.output_dir}/proxy")
    print(f"report: {config.output_dir}/report.md (and report.html, report.json, block_influence.png)")


if __name__ == "__main__":
    run_command(main, USAGE)
