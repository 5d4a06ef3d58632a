"""QEMU without KVM, on one CPU whose clock counts instructions: one takes a nanosecond.

So times in the guest don't depend on the machine, or on what else it does. Debian's own kernel
boots from an initrd that has just enough modules to mount the machine's / as its root, by 9p.
"""

from __future__ import annotations

import lzma
import shutil
from pathlib import Path

from jobs import Job, Lines
from packages import Kernel, run, through_loader

# The machine's bus and file system; and AES by the processor's instructions, which udev would
# load on a real machine.
MODULES = ("virtio_pci", "9pnet_virtio", "9p", "aesni_intel")

INIT = """\
#!/busybox sh
/busybox mkdir -p /proc /machine
/busybox mount -t proc proc /proc
for module in {modules}; do
    /busybox insmod /$module
done
options=trans=virtio,version=9p2000.L,msize=512000,cache=loose
/busybox mount -t 9p -o $options machine /machine
/busybox mount -t devtmpfs dev /machine/dev
/busybox umount /proc
exec /busybox switch_root /machine /bin/sh {box}/init
"""


def arrange(root: Path, _home: Path) -> None:
    """Finishes Debian's package, as `packages.Recipe` wants it."""
    places = [root / "lib" / "modules", root / "usr" / "lib" / "modules"]
    (modules,) = (place for place in places if place.exists())
    (root / "modules").symlink_to(modules.relative_to(root))
    (version,) = (directory.name for directory in modules.iterdir())
    kernels = [root / "boot" / f"vmlinuz-{version}", modules / version / "vmlinuz"]  # old, new
    (kernel,) = (place for place in kernels if place.exists())
    (root / "linux").symlink_to(kernel.relative_to(root))
    # depmod looks where its own suite has modules.
    base = root / "base"
    for place in ("lib", "usr/lib"):
        (base / place).mkdir(parents=True)
        (base / place / "modules").symlink_to(modules)
    (base / "depmod").symlink_to(root / "modprobe")
    loader = through_loader(root, "bin/kmod")[:-1]
    run(*loader, str(base / "depmod"), "-b", str(base), version)
    shutil.rmtree(base)


def start(box: Path, kernel: Kernel, job: Job, lines: Lines) -> list[str]:
    """Returns the words that start it, as `jobs.Starter` wants it."""
    write_initrd(box, kernel)
    serial = {"out": f"/dev/fd/{lines.out}", "err": f"/dev/fd/{lines.err}", "log": "/dev/stdout"}
    words = ["qemu-system-x86_64", "-machine", "q35,accel=tcg", "-cpu", "max", "-smp", "1"]
    words += ["-icount", "shift=0,sleep=off", "-m", f"{job.memory >> 20}M"]
    words += ["-nodefaults", "-display", "none", "-no-reboot"]
    for name, path in serial.items():
        words += ["-chardev", f"file,id={name},path={path}", "-serial", f"chardev:{name}"]
    words += ["-fsdev", "local,id=machine,path=/,security_model=none,multidevs=remap"]
    words += ["-device", "virtio-9p-pci,fsdev=machine,mount_tag=machine"]
    words += ["-kernel", str(kernel.program), "-initrd", str(box / "initrd")]
    line = f"console=ttyS2 quiet panic=-1 mitigations=off tsc=reliable {job.append}"
    return [*words, "-append", line]


def write_initrd(box: Path, kernel: Kernel) -> None:
    """Makes the archive that the kernel unpacks and starts `init` from."""
    tree = box / "tree"
    tree.mkdir()
    shutil.copy(kernel.home / "busybox", tree)
    modules = modules_in_order(kernel)
    for module in modules:
        compressed = module.suffix == ".xz"
        content = module.read_bytes()
        (tree / module.stem).write_bytes(lzma.decompress(content) if compressed else content)
    names = " ".join(module.stem for module in modules)
    (tree / "init").write_text(INIT.format(modules=names, box=box))
    (tree / "init").chmod(0o755)
    pack = "find . | ./busybox cpio -o -H newc"
    run("sh", "-c", f'cd "$1" && {pack} >"$2"', "sh", str(tree), str(box / "initrd"))


def modules_in_order(kernel: Kernel) -> list[Path]:
    """Returns the files of `MODULES` and of those that they need, which come before them."""
    (directory,) = kernel.modules.iterdir()
    needs = {}
    for line in (directory / "modules.dep").read_text().splitlines():
        file, _, others = line.partition(":")
        needs[file] = others.split()
    by_name = {Path(file).name.partition(".")[0].replace("-", "_"): file for file in needs}
    files = [by_name[name] for name in MODULES if name in by_name]  # else it is built in
    ordered = [one for file in files for one in (*reversed(needs[file]), file)]
    return [directory / file for file in dict.fromkeys(ordered)]
