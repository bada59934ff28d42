"""Trains and tests recommenders: `python run_recbole_mm.py --model=PRIME
--dataset=amazon-beauty`."""

from recbole_mm.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
