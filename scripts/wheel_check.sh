#!/usr/bin/env bash
# Does the package work for someone who only has the wheel? Built from the sdist, installed into an empty virtual
# environment without any extra, used from a folder outside the repository. Usage: scripts/wheel_check.sh [PYTHON],
# where PYTHON has the `build` package.
set -euo pipefail

cd "$(dirname "$0")/.."
repository=$PWD
python=${1:-.venv/bin/python}

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# Long output is shown only if the step fails.
quietly() {
    local title=$1
    shift
    echo "wheel check: $title"
    if ! "$@" >"$work/log" 2>&1; then
        tail -n 40 "$work/log" >&2
        echo "wheel check: failed: $title" >&2
        exit 1
    fi
}

# Without --wheel, `build` makes the wheel from the sdist, so a file missing there is missed here too.
quietly "building sdist and wheel" "$python" -m build --outdir "$work/dist" .
wheel=$(echo "$work"/dist/*.whl)

"$python" - "$wheel" <<'EOF'
import sys
from pathlib import Path
from zipfile import ZipFile

names = set(ZipFile(sys.argv[1]).namelist())
expected = {"sb3_pgplus/__init__.py", "sb3_pgplus/py.typed"}
expected |= {f"sb3_pgplus/{path}" for path in Path("zoo_configs").rglob("*.yml")}
if missing := sorted(expected - names):
    sys.exit(f"wheel check: the wheel lacks {', '.join(missing)}")
if strays := sorted(name for name in names if not name.startswith(("sb3_pgplus/", "sb3_pgplus-"))):
    sys.exit(f"wheel check: the wheel would install {', '.join(strays[:5])} beside the package")
EOF

"$python" -m venv "$work/venv"
bin=$work/venv/bin
# Only what the package itself asks for: something that comes with an extra and is imported all the same shows here.
quietly "installing the wheel and its dependencies" \
    "$bin/python" -m pip install --disable-pip-version-check -c constraints.txt "$wheel"
quietly "dependencies agree" "$bin/python" -m pip check

mkdir "$work/elsewhere"
cd "$work/elsewhere"
export OMP_NUM_THREADS=1 MKL_NUM_THREADS=1

echo "wheel check: importing"
# -P: the current folder is no part of the path, as for the console script.
"$bin/python" -P - "$repository" <<'EOF'
import sys
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path

import sb3_pgplus

package = Path(sb3_pgplus.__file__).resolve().parent
repository = Path(sys.argv[1]).resolve()
assert repository not in package.parents, f"imported from the repository: {package}"
assert version("sb3_pgplus") == sb3_pgplus.__version__
configs = sorted(path.name for path in files("sb3_pgplus").joinpath("zoo_configs").iterdir() if path.name.endswith(".yml"))
assert configs == sorted(path.name for path in (repository / "zoo_configs").glob("*.yml")), configs
EOF

quietly "sb3-pgplus --help" "$bin/sb3-pgplus" --help
quietly "python -m sb3_pgplus.cli --help" "$bin/python" -P -m sb3_pgplus.cli --help
quietly "training" "$bin/sb3-pgplus" train --env CartPole-v1 --n-timesteps 2048 --seed 0 --no-progress --out run
for file in model.zip config.yml progress.csv; do
    [ -s "run/$file" ] || { echo "wheel check: the training left no $file" >&2; exit 1; }
done
quietly "evaluating" "$bin/sb3-pgplus" evaluate run
echo "wheel check: passed"
