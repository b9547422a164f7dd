// What others read of the fleet: /ready, /status.json, and Prometheus' list of targets.

import answers from './answers.js';
import fleet from './fleet.js';
import metrics from './metrics.js';
import settings from './settings.js';

const OTEL_PORT = 9464;   // where a replica shows its metrics to Prometheus

function ready(r) {
    const table = fleet.table();
    const up = table.replicas.filter((replica) => replica.state === 'ready').length;
    if (up) {
        answers.json(r, { ready: up, replicas: table.replicas.length });
    } else {
        answers.send(r, 503, 'no_replica_ready', 'No replica is ready.');
    }
}

function targets(r) {
    answers.json(r, fleet.read().map(({ name, host }) => ({
        targets: [`${host.replace(/:\d+$/, '')}:${OTEL_PORT}`], labels: { replica: name },
    })));
}

function status(r) {
    const table = fleet.table();
    answers.json(r, {
        gateway: {
            version: ngx.version,
            policy: settings.policy,
            uptime_s: Math.round((fleet.clock() - fleet.started()) / 1000),
            refused: metrics.refusals(),
        },
        models: Object.keys(table.models),
        replicas: table.replicas.map((replica) => ({
            name: replica.name,
            state: replica.state === 'unknown' ? 'loading' : replica.state,
            reason: replica.reason,
            models: replica.models,
            weight: replica.weight,
            in_flight: fleet.inFlight(replica.name),
            running: replica.metrics.running || 0,
            waiting: replica.metrics.waiting || 0,
            kv_usage: replica.metrics.kv || 0,
            prefix_hit_rate: replica.metrics.queries ? replica.metrics.hits / replica.metrics.queries : null,
            tokens_per_s: replica.metrics.rate || 0,
            ttft_ms: replica.metrics.ttft_ms ?? null,
        })),
    });
}

export default { ready, targets, status };
