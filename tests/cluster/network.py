"""The machine's side of the cluster's network: one bridge, one nft table, forwarding; and taking them away."""

import json
import subprocess
from pathlib import Path

from tests.cluster import settings
from tests.cluster.state import State

FORWARDING = Path("/proc/sys/net/ipv4/ip_forward")


def _run(*command: str, stdin: str | None = None) -> str:
    result = subprocess.run(command, input=stdin, capture_output=True, text=True)
    if result.returncode:
        raise OSError(f"{' '.join(command)} failed: {result.stderr.strip()}")
    return result.stdout


def _exists(interface: str) -> bool:
    return Path("/sys/class/net", interface).exists()


def up(state: State) -> None:
    """Bridge with our address, forwarding, and masquerading of what pods send to the outside."""
    for link in json.loads(_run("ip", "-json", "address")):
        held = {entry["local"] for entry in link["addr_info"]}
        if link["ifname"] != settings.BRIDGE and settings.HOST_IP in held:
            raise OSError(f"{settings.HOST_IP} is already on {link['ifname']}: the cluster's bridge needs that address")
    if not _exists(settings.BRIDGE):
        _run("ip", "link", "add", settings.BRIDGE, "type", "bridge")
    _run("ip", "address", "replace", f"{settings.HOST_IP}/24", "dev", settings.BRIDGE)
    _run("ip", "link", "set", settings.BRIDGE, "up")
    state.ip_forward_before = FORWARDING.read_text().strip()
    state.save()
    FORWARDING.write_text("1\n")
    # Not the CNI plugin's own masquerading: its iptables chains would outlive a node that is killed.
    _run(
        "nft",
        "-f",
        "-",
        stdin=f"""
        table ip {settings.NFT_TABLE} {{
          chain outbound {{
            type nat hook postrouting priority srcnat;
            ip saddr {settings.POD_CIDR} ip daddr != {{ {settings.POD_CIDR}, {settings.HOST_IP}/24 }} masquerade
          }}
        }}
        """,
    )


def down(state: State) -> None:
    """Undo `up`, and remove the tables that kube-proxy left."""
    tables = json.loads(_run("nft", "--json", "list", "tables"))["nftables"]
    for table in (entry["table"] for entry in tables if "table" in entry):
        if table["name"] in ("kube-proxy", settings.NFT_TABLE):
            _run("nft", "delete", "table", table["family"], table["name"])
    if _exists(settings.BRIDGE):
        _run("ip", "link", "delete", settings.BRIDGE)
    if state.ip_forward_before is not None:
        FORWARDING.write_text(state.ip_forward_before + "\n")
