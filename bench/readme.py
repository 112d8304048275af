"""`python -m flashpo.bench.readme`: writes the tables of our pages from bench/results/*.jsonl, between their markers.

A table is between `<!-- table: TITLE -->` and `<!-- end -->`. TITLE is a title of `flashpo bench`; for a GPU it is
followed by the name of the file with the results, as in "TITLE on gpu-h200". The newest record is used, and the page
shows the machine and the command that made it. "algorithms" is the table of algorithms.py, with what each algorithm
learned in the newest `make zoo` that ran it. "expectations" is the table of expectations.py.
"""

import json
import pathlib
import re
import sys

from flashpo.bench import algorithms, expectations
from flashpo.bench.run import number

ROOT = pathlib.Path(__file__).resolve().parents[1]
PAGES = (ROOT / "README.md", ROOT / "docs" / "algorithms.md", ROOT / "docs" / "benchmarks.md")
HEADS = {
    "ms": "ms",
    "ms_trl": "TRL, ms",
    "tokens": "tokens computed",
    "tokens_padded": "tokens in TRL's rows",
    "us": "µs",
    "times_gemm": "÷ its GEMMs",
    "times_flashpo": "÷ FlashPO",
    "extra_mb": "extra MiB",
    "error_nats": "max error, nats",
    "gb_per_s": "GB/s",
    "share_of_read_bandwidth": "share of read bandwidth",
    "share_of_copy_bandwidth": "share of copy bandwidth",
    "max_error": "max error",
    "tokens_per_s": "tokens/s",
    "ms_per_step": "ms a step",
    "standard_deviation": "standard deviation, nats",
    "max": "max, nats",
    "ratios_off_by_10_percent": "ratios off by 10 %",
    "effective_sample_size": "effective sample size",
    "share_of_flash": "share of FlashAttention",
    "times_floor": "÷ the floor",
    "share_of_floor": "share of the floor",
    "cache_mb": "cache, MiB",
    "gflops": "GFLOP/s",
    "gflop_per_s": "GFLOP/s",
    "share_of_gemm": "share of a GEMM",
    "gemm_gflops": "GEMM, GFLOP/s",
    "copy_gb_per_s": "copy, GB/s",
    "peak_mb": "peak MiB",
    "off_by_nats": "off by, nats",
    "reward_first": "first reward",
    "reward_last": "last reward",
    "reward_spread": "its spread over seeds",
}


def newest() -> dict[str, tuple[dict, list[dict]]]:
    """title -> (document, records), for the newest records."""
    found = {}
    for file in sorted((ROOT / "bench" / "results").glob("*.jsonl")):
        place = f" on {file.stem}" if file.stem.startswith("gpu-") else ""
        for line in file.read_text().splitlines():
            document = json.loads(line)
            for title, records in document["tables"].items():
                title += place
                if title not in found or document["time"] > found[title][0]["time"]:
                    found[title] = document, records
    return found


def learned() -> dict[str, dict]:
    """name -> its record in the newest `make zoo` that ran it."""
    files = (ROOT / "bench" / "results").glob("*.jsonl")
    documents = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    tables = [
        records
        for document in sorted(documents, key=lambda document: document["time"])
        for title, records in document["tables"].items()
        if title.startswith("zoo")
    ]
    return {record["variant"]: record for records in tables for record in records}


def rows_of(records: list[dict]) -> list[str]:
    columns = list(dict.fromkeys(key for record in records for key in record if key != "variant"))
    texts = [any(isinstance(record.get(column), str) for record in records) for column in columns]
    rules = ["---" if text else "---:" for text in texts]
    rows = [["", *(HEADS.get(column, column) for column in columns)], ["---", *rules]]
    rows += [[record["variant"], *(number(record.get(column)) for column in columns)] for record in records]
    return ["| " + " | ".join(row) + " |" for row in rows]


def markdown(document: dict, records: list[dict]) -> str:
    threads = [] if "--device cuda" in document["command"] else [f"{document['threads']} threads"]
    where = ", ".join([document["machine"], *threads, f"torch {document['torch']}"])
    return "\n".join([*rows_of(records), "", f"`{document['command']}` on {where}, {document['time'][:10]}."])


def filled(text: str) -> str:
    tables = newest()

    def fill(match: re.Match) -> str:
        title = match[1]
        made = {
            "algorithms": lambda: rows_of(algorithms.records(learned())),
            "expectations": lambda: expectations.rows(tables),
        }
        if title in made:
            return f"<!-- table: {title} -->\n" + "\n".join(made[title]()) + "\n<!-- end -->"
        if title not in tables:
            raise SystemExit(f"a page asks for {title!r}, which bench/results does not have; it has {sorted(tables)}")
        return f"<!-- table: {title} -->\n{markdown(*tables[title])}\n<!-- end -->"

    return re.sub(r"<!-- table: (.+?) -->\n.*?<!-- end -->", fill, text, flags=re.DOTALL)


def main() -> int:
    for page in PAGES:
        page.write_text(filled(page.read_text()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
