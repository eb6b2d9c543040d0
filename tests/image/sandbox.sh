#!/usr/bin/env bash
# Run a command in a mount namespace of its own that has an image's folders.
#
#   sandbox.sh build FOLDER COMMAND...     as root, FOLDER/opt mounted on /opt
#   sandbox.sh run FOLDER COMMAND...       as user 10001 without any right, root read-only;
#                                          writable: /tmp, /dev/shm, FOLDER/cache on
#                                          /var/cache/mdkv and FOLDER/models on /srv
#
# The home folder, the source tree and all else under /root and /tmp are not there, except for the
# Python that PYTHON_PREFIX names. The environment is the caller's.
set -euo pipefail

if [[ "${IN_NAMESPACE:-}" != yes ]]; then
    IN_NAMESPACE=yes exec unshare --mount --propagation private "$0" "$@"
fi
unset IN_NAMESPACE
mode="$1" folder="$(realpath "$2")"
shift 2

# /opt: the folder's, and what this machine has there.
mount -t tmpfs tmpfs /media
mkdir /media/opt /media/python
mount --bind /opt /media/opt
mount --bind "$PYTHON_PREFIX" /media/python
mount --bind "$folder/opt" /opt
for entry in /media/opt/*; do
    mkdir -p "/opt/${entry##*/}"
    mount --bind "$entry" "/opt/${entry##*/}"
done

if [[ "$mode" == run ]]; then
    mount -t tmpfs tmpfs /var/cache
    mkdir /var/cache/mdkv
    mount --bind "$folder/cache" /var/cache/mdkv
    mount --bind "$folder/models" /srv
    # What the image's useradd does.
    cp /etc/passwd /media/passwd
    echo mdkv:x:10001:10001::/var/cache/mdkv:/usr/sbin/nologin >>/media/passwd
    mount --bind /media/passwd /etc/passwd
fi

mount -t tmpfs -o mode=1777 tmpfs /tmp
if [[ "$PYTHON_PREFIX" == /root/* ]]; then
    mount -t tmpfs -o mode=755 tmpfs /root
    mkdir -p "$PYTHON_PREFIX"
    mount --bind /media/python "$PYTHON_PREFIX"
fi

if [[ "$mode" == run ]]; then
    mount -o remount,bind,ro /opt
    mount -o remount,bind,ro /
    cd /var/cache/mdkv
    exec setpriv --reuid 10001 --regid 10001 --clear-groups --bounding-set=-all --inh-caps=-all \
        --no-new-privs "$@"
fi
cd /opt/source
exec "$@"
