// What others read of the fleet: /ready, /status.json, and Prometheus' list of targets.

import answers from './answers.js';
import fleet from './fleet.js';
import hosts from './hosts.js';
import metrics from './metrics.js';
import objectives from './objectives.js';
import settings from './settings.js';

const OTEL_PORT = 9464;   // where a replica shows its metrics to Prometheus
const API_PORT = 8000;    // of the first replica behind a link, whose metrics are on OTEL_PORT there; those of others follow

function ready(r) {
    const table = fleet.table();
    const count = (state) => table.replicas.filter((replica) => replica.state === state).length;
    const [up, asleep] = [count('ready'), count('asleep')];
    if (up || asleep) {
        answers.json(r, { ready: up, asleep, replicas: table.replicas.length });
    } else {
        answers.send(r, 503, 'no_replica_ready', 'No replica is ready.');
    }
}

function targets(r) {
    // At the gateway's own address there is only a way on to a replica (conf.d/onward.conf), and nobody else comes there.
    const reachable = fleet.read().filter(({ host }) => !host.startsWith('127.0.0.1:'));
    answers.json(r, reachable.map(({ name, host, on }) => {
        const [, address, port] = /^(.*?)(?::(\d+))?$/.exec(host);
        return {
            targets: [`${address}:${OTEL_PORT + (on ? port - API_PORT : 0)}`],
            labels: on ? { replica: name, host: on } : { replica: name },
        };
    }));
}

// Each model by its first name, with its objectives, and [how many kept it, how many there were] of first tokens and of further
// ones since the replicas started.
function kept(table) {
    const found = Object.create(null);
    for (const { models, metrics: { timely } } of table.replicas) {
        const objective = timely && models.length ? objectives.of(models[0]) : null;
        if (objective) {
            const model = found[models[0]] = found[models[0]] || { model: models[0], objective, ttft: [0, 0], itl: [0, 0] };
            for (const [name, field] of [['ttft', 'ttft_p95_seconds'], ['itl', 'itl_p95_seconds']]) {
                model[name] = model[name].map((count, i) => count + (timely[field] || [0, 0])[i]);
            }
        }
    }
    return Object.values(found);
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
        differences: hosts.differences(table.replicas),
        objectives: kept(table),
        replicas: table.replicas.map((replica) => ({
            name: replica.name,
            host: replica.on,
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
