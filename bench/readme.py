"""`python -m flashpo.bench.readme`: writes the tables of README.md from bench/results/*.jsonl, between their markers.

A table stands between `<!-- table: TITLE -->` and `<!-- end -->`; TITLE is that of `flashpo bench`, and the newest
record of it is taken, with the machine and the command that made it.
"""

import json
import pathlib
import re
import sys

from flashpo.bench.run import number

ROOT = pathlib.Path(__file__).resolve().parents[1]
HEADS = {
    "ms": "ms",
    "us": "µs",
    "times_gemm": "÷ its GEMMs",
    "times_flashpo": "÷ FlashPO",
    "extra_mb": "extra MiB",
    "error_nats": "max error, nats",
    "gb_per_s": "GB/s",
    "share_of_read_bandwidth": "share of read bandwidth",
}


def newest() -> dict[str, tuple[dict, list[dict]]]:
    """title -> (document, records)"""
    found = {}
    for file in sorted((ROOT / "bench" / "results").glob("*.jsonl")):
        for line in file.read_text().splitlines():
            document = json.loads(line)
            for title, records in document["tables"].items():
                if title not in found or document["time"] > found[title][0]["time"]:
                    found[title] = document, records
    return found


def markdown(document: dict, records: list[dict]) -> str:
    columns = list(dict.fromkeys(key for record in records for key in record if key != "variant"))
    rows = [["", *(HEADS.get(column, column) for column in columns)], ["---", *["---:"] * len(columns)]]
    rows += [[record["variant"], *(number(record.get(column)) for column in columns)] for record in records]
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    where = f"{document['machine']}, {document['threads']} threads, torch {document['torch']}"
    return "\n".join([*lines, "", f"`{document['command']}` on {where}, {document['time'][:10]}."])


def main() -> int:
    readme, tables = ROOT / "README.md", newest()
    text = readme.read_text()

    def fill(match: re.Match) -> str:
        title = match[1]
        if title not in tables:
            raise SystemExit(
                f"README.md asks for {title!r}, which bench/results does not have; it has {sorted(tables)}"
            )
        return f"<!-- table: {title} -->\n{markdown(*tables[title])}\n<!-- end -->"

    filled = re.sub(r"<!-- table: (.+?) -->\n.*?<!-- end -->", fill, text, flags=re.DOTALL)
    readme.write_text(filled)
    return 0


if __name__ == "__main__":
    sys.exit(main())
