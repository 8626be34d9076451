"""The versions that a file of results names: torch, the date, the commit."""

import time

import torch
from machine import commit


def versions(**more: str) -> dict[str, str | None]:
    return {"torch": str(torch.__version__), **more, "date": time.strftime("%Y-%m-%d"), "commit": commit()}
