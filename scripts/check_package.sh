#!/usr/bin/env bash
# Build wheel and sdist, install the wheel into an empty environment away from the repository, and
# use it there: scripts/check_package.sh PYTHON MODEL   (PYTHON has `build`; MODEL: a tokenizer)
set -euo pipefail
python=$(realpath --no-symlinks "$1") model=$(realpath "$2")
cd "$(dirname "$0")/.."
work=$(mktemp -d)
server=
trap '[ -z "$server" ] || kill "$server"; rm -rf "$work"' EXIT

"$python" -m build --outdir "$work/dist" . > "$work/build.log" 2>&1 || { cat "$work/build.log"; exit 1; }
ls -l "$work/dist"
cd "$work"
"$python" -m venv env
env/bin/pip install --quiet "$(echo dist/*.whl)[demo]"
env/bin/python - << 'EOF'
import flextok, pathlib
from flextok.data.emoji import Emoji
assert pathlib.Path("env").resolve() in pathlib.Path(flextok.__file__).parents, flextok.__file__
assert (pathlib.Path(flextok.__file__).parent / "py.typed").is_file()
Emoji("validation")[0]["image"].save("picture.jpg")
EOF
env/bin/flextok info "$model" --json > info.json
env/bin/flextok reconstruct picture.jpg --model "$model" --output out.png
test -s out.png
env/bin/flextok demo "$model" --port 7899 &
server=$!
for _ in $(seq 120); do
    if env/bin/python -c "import urllib.request as u; u.urlopen('http://127.0.0.1:7899/')" 2> /dev/null; then
        echo "the package works away from the repository"
        exit 0
    fi
    sleep 1
done
echo "flextok demo did not answer" >&2
exit 1
