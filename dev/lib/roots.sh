# Servers of another Debian release, in a root folder of its own: POSTROOM_DEV_SERVERS=trixie has RabbitMQ 4.0 and
# Postgres 17. The folder is made once by debootstrap and used by every pair; data and logs are where they always are.
# From debootstrap's own mirror, unless POSTROOM_DEV_MIRROR names another.

# use_release RELEASE: sets ROOT, making the folder if need be.
use_release() {
    case "$1" in
        trixie) ;;
        *) refuse "POSTROOM_DEV_SERVERS=$1: only trixie is known" ;;
    esac
    ROOT="${POSTROOM_DEV_ROOTS:-$top/.servers-roots}/$1"
    [ "$(id -u)" = 0 ] || refuse "servers of Debian $1 are started through chroot, which needs root; or name servers
of yours in POSTROOM_TEST_AMQP_URL and POSTROOM_TEST_DATABASE_URL."
    [ -e "$ROOT/.complete" ] || make_root "$1"
    binaries_are_installed || die "$ROOT has no servers; remove it"
}

# Two pairs may ask at once: the first makes the folder.
make_root() {
    local release=$1 lock="$ROOT.lock" log="$ROOT.log"
    mkdir -p "$(dirname "$ROOT")"
    ROOT=$(cd "$(dirname "$ROOT")" && pwd)/$release
    within 1800 mkdir "$lock" 2>/dev/null || die "another dev/servers holds $lock; remove it if none runs"
    if [ ! -e "$ROOT/.complete" ]; then
        ( unset ROOT; command -v debootstrap > /dev/null 2>&1 || apt_install debootstrap ) || { rmdir "$lock"; exit 2; }
        say "making a root folder of Debian $release in $ROOT: two minutes or so, once (log: $log) ..."
        rm -rf "$ROOT"
        if ! debootstrap --variant=minbase --include=rabbitmq-server,postgresql "$release" "$ROOT" ${POSTROOM_DEV_MIRROR:+"$POSTROOM_DEV_MIRROR"} \
            > "$log" 2>&1 < /dev/null; then
            tail -n 20 "$log" >&2
            rmdir "$lock"
            die "debootstrap did not work; see $log"
        fi
        touch "$ROOT/.complete"
    fi
    rmdir "$lock"
}

# in_root COMMAND...: COMMAND with the programs of $ROOT, if there is one, and the folder of the pair under its own name.
# The mounts are in a namespace of the command's own and end with it. The process id stays.
in_root() {
    if [ -z "$ROOT" ]; then
        exec "$@"
    fi
    mkdir -p "$ROOT$DIR"
    # shellcheck disable=SC2016 # its own arguments
    exec unshare --mount --propagation private -- sh -c '
        root=$1 dir=$2; shift 2
        mount --rbind /proc "$root/proc" && mount --rbind /dev "$root/dev" && mount --bind "$dir" "$root$dir" || exit 1
        here=$PWD; cd "$dir" || exit 1
        case $here in "$dir"*) ;; *) here=$dir ;; esac
        exec chroot "$root" sh -c '\''cd "$1" && shift && exec "$@"'\'' sh "$here" "$@"' sh "$ROOT" "$DIR" "$@"
}
