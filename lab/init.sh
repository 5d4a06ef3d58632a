#!/bin/sh
# The lab's guest: PID 1. The machine's own / is already mounted. `settings` and
# `command`, beside this file, come from the host; `status` goes back there.
#
# The command's output passes through two pipes to two raw serial lines, which the host reads:
# so it is no terminal to the command, no byte is changed, and kernel messages stay elsewhere.

PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
export PATH
box=${0%/*}
lab=/run/ktls-lab

# Mounts a tmpfs on each directory, and shows through it the paths in $keep, one a line: those
# that the command needs although they lie below.
mount_tmpfs() {
    mkdir /dev/machine /dev/shm
    mount --bind / /dev/machine
    for directory in /run /tmp /dev/shm; do
        mkdir -p "$directory"
        mount -t tmpfs -o "mode=1777,size=$tmpfs_size" tmpfs "$directory"
    done
    printf '%s' "$keep" | while IFS= read -r path; do
        if [ -h "/dev/machine$path" ]; then
            cp -P "/dev/machine$path" "$path"
            continue
        elif [ -d "/dev/machine$path" ]; then
            mkdir -p "$path"
        else
            : >"$path"
        fi
        mount --bind "/dev/machine$path" "$path"
    done
    umount /dev/machine
    rmdir /dev/machine
}

mount_system() {
    mount -t proc proc /proc
    mount -t sysfs sysfs /sys
    mkdir /dev/pts
    mount -t devpts -o gid=5,mode=620,ptmxmode=666 devpts /dev/pts
    ln -s /proc/self/fd /dev/fd
    ln -s fd/0 /dev/stdin
    ln -s fd/1 /dev/stdout
    ln -s fd/2 /dev/stderr
}

# The kernel finds modprobe through /proc, and modprobe the modules through -d: it works on a
# machine that has neither kmod nor /lib/modules.
offer_modules() {
    mkdir "$lab/lib" "$lab/usr"
    ln -s "$home/modules" "$lab/lib/modules"
    ln -s ../lib "$lab/usr/lib"
    printf '#!/bin/sh\nexec "%s" -d %s "$@"\n' "$home/modprobe" "$lab" >"$lab/modprobe"
    chmod 755 "$lab/modprobe"
    echo "$lab/modprobe" >/proc/sys/kernel/modprobe
    [ ! -d /lib/modules ] || mount -o bind,ro "$home/modules/" /lib/modules
}

# A kernel that has TLS built in looks to some, aiofastnet for one, as if it had none.
show_tls_as_module() {
    mount -t tmpfs tmpfs /sys/module
    mkdir /sys/module/tls
}

start_network() {
    echo "$hostname" >/proc/sys/kernel/hostname
    "$home/busybox" ip link set lo up
}

# Runs the command, and leaves once all it wrote is on its way to the host.
run_command() {
    mkfifo "$lab/out" "$lab/err"
    for line in ttyS0 ttyS1; do
        stty -F /dev/$line raw -echo
    done
    cat "$lab/out" >/dev/ttyS0 &
    out=$!
    cat "$lab/err" >/dev/ttyS1 &
    err=$!
    sh "$box/command" </dev/null >"$lab/out" 2>"$lab/err"
    echo $? >"$box/status"
    # What the command left running would keep the pipes open.
    for process in /proc/[1-9]*; do
        case ${process#/proc/} in
        1 | "$out" | "$err") ;;
        *) kill -9 "${process#/proc/}" ;;
        esac
    done
    wait "$out" "$err"
}

. "$box/settings"
exec </dev/null >/dev/console 2>&1
mount_tmpfs
mount_system
mkdir "$lab"
if [ -e "$home/modules" ]; then
    offer_modules
else
    show_tls_as_module
fi
start_network
ulimit -H -n 65536
[ -z "$load" ] || "$lab/modprobe" -a $load
run_command
sync
echo o >/proc/sysrq-trigger
while :; do
    sleep 60
done
