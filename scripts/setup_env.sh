# Creates .venv with this package and one extra, and activates it. The other scripts source this file.
#
#   setup_env EXTRA        EXTRA is a key of [project.optional-dependencies] in pyproject.toml
#
# A stamp in .venv records the extra and the hash of pyproject.toml, so that a second call costs nothing.
# `dev` contains every other extra that the scripts use. PYTHON names the interpreter of a new
# environment (default python3). pip reads its usual settings.

setup_env() {
    local extra=$1 digest quiet=
    local python=${PYTHON:-python3}
    if [ ! -x .venv/bin/pip ]; then
        "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
            echo "mesa_train needs Python 3.10 or newer; $("$python" --version) was found." \
                "Name another with PYTHON=..." >&2
            return 1
        }
        echo "Making .venv with $("$python" --version)"
        "$python" -m venv .venv
    fi
    digest=$(.venv/bin/python -c \
        'import hashlib, sys; print(hashlib.sha256(open(sys.argv[1], "rb").read()).hexdigest())' \
        pyproject.toml)
    if [ "$(cat ".venv/.installed-$extra" 2>/dev/null)" != "$digest" ] &&
        [ "$(cat .venv/.installed-dev 2>/dev/null)" != "$digest" ]; then
        echo "Installing mesa_train[$extra] and what it needs; the first time this takes minutes"
        [ -t 1 ] || quiet=--quiet # on a terminal pip shows its downloads
        .venv/bin/python -m pip install --disable-pip-version-check $quiet --editable ".[$extra]"
        echo "$digest" >".venv/.installed-$extra"
    fi
    export PATH="$PWD/.venv/bin:$PATH"
}
