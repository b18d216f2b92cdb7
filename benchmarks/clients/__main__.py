"""`python -m benchmarks.clients [EXAMPLE ...]`: every client's example, against its own loss.

Each client gets an environment of its own in `.clients/`, made when its requirements change; all
share one torch. The table goes to the screen and to `benchmarks/results/clients.json`, from where
`benchmarks.readme` takes it; of some examples only, it goes to the screen alone.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import venv
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.readme import CLIENTS as RESULT
from benchmarks.readme import clients_table
from benchmarks.record import ROOT, record, write_json

ENVIRONMENTS = ROOT / ".clients"
HSTU = os.environ.get("HSTU")  # a checkout of meta-recsys/generative-recommenders
LIMIT = 1e-5  # float32: sums in another order

Row = dict[str, Any]


class Client(NamedTuple):
    client: str
    example: str
    own: str  # what the swap is compared with
    package: str  # which names the version
    needs: tuple[str, ...]
    alone: tuple[str, ...] = ()  # installed without what they name


# RecBole uses names that NumPy 2 and pandas 3 have taken away. TorchRec names a build of FBGEMM for
# CUDA; that for a CPU goes by another name, and 1.8 is the one for torch 2.13.
FBGEMM = "fbgemm-gpu-cpu==1.8.0"
CLIENTS = (
    Client("Lightning", "lightning_domains", "the formula in PyTorch; resumes from a checkpoint",
           "lightning", ("lightning==2.6.6",)),
    Client("RecBole", "recbole_sasrec", "`SASRec`, `loss_type: CE`", "recbole",
           ("recbole==1.2.1", "numpy<2", "pandas<3")),
    Client("RecTools", "rectools_sasrec", '`SASRecModel(loss="softmax")`', "rectools",
           ("rectools[torch]==0.19.0",)),
    Client("RePlay", "replay_sasrec", "`CE`, and `CESampled` with three shapes of negatives",
           "replay-rec", ("replay-rec[torch]==0.22.0",)),
    Client("HSTU", "hstu_loss", "`SampledSoftmaxLoss`" if HSTU else "the formula in PyTorch",
           "generative-recommenders", (FBGEMM,)),
    Client("sentence-transformers", "sentence_transformers_ranking",
           "`MultipleNegativesRankingLoss`, hard negatives too", "sentence-transformers",
           ("sentence-transformers[train]==6.2.0",)),
    Client("Hugging Face Trainer", "huggingface_trainer", "the loss of `GPT2LMHeadModel`",
           "transformers", ("transformers==5.24.0", "accelerate==1.15.0")),
    Client("TorchRec", "torchrec_two_tower", "the formula in PyTorch", "torchrec",
           (FBGEMM, "tensordict", "torchmetrics==1.0.3", "pyre-extensions", "typing-inspect",
            "tqdm"), ("torchrec==1.9.0",)),
)  # fmt: skip


def main() -> None:
    wanted = sys.argv[1:] or [client.example for client in CLIENTS]
    unknown = set(wanted) - {client.example for client in CLIENTS}
    if unknown:
        names = ", ".join(client.example for client in CLIENTS)
        sys.exit(f"no such example: {', '.join(unknown)}; there are {names}")
    rows = []
    for client in CLIENTS:
        if client.example in wanted:
            print(f"{client.client} ...", flush=True)
            rows.append(row(client))
    print("\n" + clients_table({"clients": rows, **record()}))
    if not sys.argv[1:]:
        write_json(RESULT, record(command="make clients", clients=rows))
    apart = [row["client"] for row in rows if not agrees(row)]
    if apart:
        sys.exit(f"differs by more than {LIMIT:g}: {', '.join(apart)}")


def agrees(row: Row) -> bool:
    """Whether loss and gradients are the client's; one that did not run says nothing."""
    return "not_run" in row or max(row["loss"], row["gradient"]) <= LIMIT


def row(client: Client) -> Row:
    """What the README's table says of a client, or why it did not run."""
    figures: Row = {"client": client.client, "example": client.example, "own": client.own}
    figures["lines"] = swapped_lines(source(client.example))
    try:
        python = environment(client)
        figures["version"] = version(python, client)
        called(python, "-m", f"dwl_kernels.examples.clients.{client.example}")
        compared = called(python, "-m", "benchmarks.clients.compare", client.example)
        figures |= json.loads(compared.splitlines()[-1])
    except subprocess.CalledProcessError as error:
        said = (error.stderr or error.stdout or "no output").strip().splitlines()
        return figures | {"not_run": said[-1]}
    return figures


def source(example: str) -> str:
    found = importlib.util.find_spec("dwl_kernels.examples.clients")
    assert found is not None
    assert found.origin is not None
    return Path(found.origin).with_name(f"{example}.py").read_text("utf-8")


def swapped_lines(text: str) -> int:
    """Lines of code between ``# swap`` and ``# end``, and those that import this package."""
    counted, inside = 0, False
    for line in map(str.strip, text.splitlines()):
        if line.startswith(("# swap", "# end")):
            inside = line.startswith("# swap")
        elif (inside and line and not line.startswith("#")) or line.startswith("from dwl_kernels"):
            counted += 1
    return counted


def environment(client: Client) -> Path:
    """The Python of the client's environment, which is made where its requirements are new."""
    torch = re.search(r"^torch==\S+", (ROOT / "constraints.txt").read_text("utf-8"), re.MULTILINE)
    assert torch is not None
    shared = made(ENVIRONMENTS / "torch", [[torch[0]]])
    alone = [["--no-deps", *client.alone]] if client.alone else []
    return made(ENVIRONMENTS / client.example, [[torch[0], "numpy", *client.needs], *alone], shared)


def made(folder: Path, installs: list[list[str]], shared: Path | None = None) -> Path:
    """An environment with what pip is told; `shared` is the Python whose packages it sees too."""
    python = folder / "bin" / "python"
    stamp, wanted = folder / "installed.json", json.dumps([sys.version, installs])
    if stamp.exists() and stamp.read_text("utf-8") == wanted:
        return python
    venv.create(folder, clear=True, symlinks=os.name != "nt", with_pip=True)
    where = "import sysconfig; print(sysconfig.get_path('purelib'))"
    if shared is not None:
        packages = Path(called(python, "-c", where).strip())
        (packages / "shared.pth").write_text(called(shared, "-c", where), "utf-8")
    for packages_of_one in installs:
        called(python, "-m", "pip", "install", "-qq", "--no-compile", *packages_of_one)
    stamp.write_text(wanted, "utf-8")
    return python


def version(python: Path, client: Client) -> str:
    if client.example == "hstu_loss":
        if HSTU is None:
            return "–"
        command = ["git", "-C", HSTU, "rev-parse", "--short", "HEAD"]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    ask = f"import importlib.metadata as m; print(m.version({client.package!r}))"
    return called(python, "-c", ask).strip()


def called(python: Path, *arguments: str) -> str:
    """What Python prints, in a folder of its own: some clients write where they run."""
    with tempfile.TemporaryDirectory() as folder:
        return subprocess.run(
            [str(python), *arguments],
            check=True,
            capture_output=True,
            text=True,
            cwd=folder,
            env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONNOUSERSITE": "1"},
        ).stdout


if __name__ == "__main__":
    main()
