"""Ask an exported model which products a customer will buy, from the lines of the log.

    dare export --run runs/dare --out models/dare
    python examples/answer_in_python.py models/dare purchases.csv

The log is that of the tutorial, and so are the names of its columns: a request has raw values, as `dare prepare` reads
them. The customer's history is scored with every product of the log, and the best ones are explained.
"""

import csv
import sys
from datetime import datetime, timedelta
from pathlib import Path

from pipeline.serve import Predictor


def main() -> None:
    """Print the five best products of one customer, and what the best one's score looks at."""
    predictor = Predictor.load(Path(sys.argv[1]))
    with open(sys.argv[2], newline="") as file:
        lines = list(csv.DictReader(file))
    customer = lines[0]["customer"]
    mine = [line for line in lines if line["customer"] == customer]
    # A list for each column, in any order of time.
    history = {name: [line[name] for line in mine] for name in ("product", "bought_at")}

    # What is bought a day later; its department is known.
    later = max(datetime.fromisoformat(line["bought_at"]) for line in mine) + timedelta(days=1)
    products = sorted({line["product"] for line in lines}, key=int)
    candidates = [{"product": product, "bought_at": later.isoformat()} for product in products]

    scores = predictor.score(history, candidates)
    for best in scores.argsort()[::-1][:5]:
        print(f"customer {customer}, product {products[best]}: {scores[best]:.4f}")
    for retrieved in predictor.explain(history, candidates[scores.argmax()])[:3]:
        print(f"  {retrieved.weight:.0%} of the attention: {retrieved.behavior}")


if __name__ == "__main__":
    main()
