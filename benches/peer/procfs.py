"""What Linux tells about processes: memory, CPU time, who listens on a port; and which machine this is."""

import os
import pathlib
import platform

PROC = pathlib.Path("/proc")
TICKS = os.sysconf("SC_CLK_TCK")


def session(leader):
    """The processes of the session that `leader` began: a worker and all that it started."""
    found = []
    for entry in PROC.iterdir():
        if entry.name.isdigit():
            fields = _stat(entry.name)
            if fields and int(fields[3]) == leader:
                found.append(int(entry.name))
    return found


def cpu_seconds(pids):
    """User and system time, with that of children that have ended and were waited for."""
    stats = [_stat(pid) for pid in pids]
    return sum(sum(int(ticks) for ticks in fields[11:15]) for fields in stats if fields) / TICKS


def memory(pids, key):
    """Bytes: VmRSS (now) or VmHWM (the peak), summed; pages that processes share count for each."""
    total = 0
    for pid in pids:
        try:
            lines = (PROC / str(pid) / "status").read_text().splitlines()
        except OSError:  # it has ended
            continue
        total += sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))
    return total


def listener(port):
    """The process that listens on a TCP port of this machine; none if it is not to be seen."""
    inodes = set()
    for table in ["tcp", "tcp6"]:
        for line in (PROC / "net" / table).read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and int(fields[1].rsplit(":", 1)[1], 16) == port:
                inodes.add(f"socket:[{fields[9]}]")
    for entry in PROC.iterdir():
        if not entry.name.isdigit():
            continue
        try:
            if any(os.readlink(link) in inodes for link in (entry / "fd").iterdir()):
                return int(entry.name)
        except OSError:  # it has ended, or is another user's
            continue
    return None


def machine():
    info = (PROC / "cpuinfo").read_text()
    models = [line.split(":", 1)[1].strip() for line in info.splitlines() if line.startswith("model name")]
    total = next(line for line in (PROC / "meminfo").read_text().splitlines() if line.startswith("MemTotal"))
    return {
        "cpu": models[0] if models else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": int(total.split()[1]) * 1024,
        "system": platform.freedesktop_os_release().get("PRETTY_NAME", platform.system()),
        "kernel": platform.release(),
    }


def _stat(pid):
    """The fields of /proc/PID/stat behind the name, which may hold anything; the first is the state."""
    try:
        return (PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
