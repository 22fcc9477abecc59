#!/usr/bin/env bash
# Build wheel and sdist, check their page for PyPI, install the wheel into an empty environment away
# from the repository, and use it there, with the models that it brings:
# scripts/check_package.sh PYTHON   (it has `build` and `twine`)
set -euo pipefail
python=$(realpath --no-symlinks "$1")
cd "$(dirname "$0")/.."
work=$(mktemp -d)
server=
trap '[ -z "$server" ] || kill "$server"; rm -rf "$work"' EXIT

"$python" -m build --outdir "$work/dist" . > "$work/build.log" 2>&1 || { cat "$work/build.log"; exit 1; }
ls -l "$work/dist"
"$python" -m twine check --strict "$work"/dist/*
cd "$work"
"$python" -m venv env
env/bin/pip install --quiet "$(echo dist/*.whl)[demo]"
env/bin/python - << 'EOF'
import flextok, pathlib
from flextok.emoji.datasets import Emoji
assert pathlib.Path("env").resolve() in pathlib.Path(flextok.__file__).parents, flextok.__file__
assert (pathlib.Path(flextok.__file__).parent / "py.typed").is_file()
Emoji("validation")[0]["image"].save("picture.jpg")
EOF
env/bin/flextok info emoji
env/bin/flextok reconstruct picture.jpg
env/bin/flextok sample --classes heart
env/bin/flextok sample --prompt "a red heart" --output heart.png
test -s outputs/reconstructed/picture-256.png && test -s outputs/sample.png && test -s heart.png
env/bin/flextok demo --port 7899 &
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
