"""Runs inside the fleet's network: the time to the first token through the gateway, and from the replicas themselves.

    python3 - GATEWAY_URL COUNT REPLICA_URL… < first_token.py

The paths take turns, so that both meet the machine at the same moments. Prints one JSON object: lists of milliseconds.
"""

import http.client
import json
import os
import random
import sys
import time
from urllib.parse import urlsplit

KEY = os.environ.get("FLEET_KEY", "")
HEADERS = {"content-type": "application/json", **({"authorization": f"Bearer {KEY}"} if KEY else {})}


def first_token(connection: http.client.HTTPConnection, model: str) -> float:
    """Milliseconds to the first token of a streamed answer to a prompt that nobody has sent before."""
    content = f"{random.getrandbits(64):x} Say a word."
    body = {"model": model, "messages": [{"role": "user", "content": content}], "max_tokens": 2, "stream": True}
    payload = json.dumps(body)
    start = time.perf_counter()
    connection.request("POST", "/v1/chat/completions", payload, HEADERS)
    answer = connection.getresponse()
    # A model may end without a word; its end is a token too.
    while not any(sign in (line := answer.readline()) for sign in (b'"content":"', b'"finish_reason":"')) or (
        b'"content":""' in line and b'"finish_reason":"' not in line
    ):
        if not line:
            raise SystemExit(f"no token came: {answer.status}")
    took = (time.perf_counter() - start) * 1000
    answer.read()
    return took


def main() -> None:
    gateway, count, *replicas = sys.argv[1:]
    paths = [gateway, *replicas]
    connections = [http.client.HTTPConnection(urlsplit(url).netloc, timeout=120) for url in paths]
    connections[0].request("GET", "/v1/models", headers=HEADERS)
    model = json.loads(connections[0].getresponse().read())["data"][0]["id"]
    took: dict[str, list[float]] = {"gateway": [], "direct": []}
    for turn in range(-3, int(count)):
        # One replica's turn, then the gateway's: as many requests by each path.
        direct = first_token(connections[1 + turn % len(replicas)], model)
        through = first_token(connections[0], model)
        if turn >= 0:
            took["direct"].append(direct)
            took["gateway"].append(through)
    print(json.dumps(took))


if __name__ == "__main__":
    main()
