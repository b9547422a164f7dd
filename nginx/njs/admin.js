// The admin interface, for the host only:
//   GET /replicas                    all replicas, with what the gateway knows of them
//   PUT|DELETE /replicas/NAME/drain  nothing new to this replica | again
//   GET|PUT|DELETE /canary           {"replicas": [NAME], "share": 0.2}: their share of new conversations

import answers from './answers.js';
import fleet from './fleet.js';

const shared = ngx.shared.fleet;

function noRoom(r) {
    answers.send(r, 503, 'no_room', 'The gateway has no room to remember this: its zone `fleet` is full.');
}

function drain(r, name) {
    if (!fleet.read().some((replica) => replica.name === name)) {
        answers.send(r, 404, 'no_such_replica', `There is no replica ${name}.`);
        return;
    }
    if (r.method === 'PUT') {
        if (!fleet.put('fleet', `drain:${name}`, '1')) {
            noRoom(r);
            return;
        }
    } else {
        shared.delete(`drain:${name}`);
    }
    const { state } = fleet.publish().replicas.find((replica) => replica.name === name);
    answers.json(r, { name, state, in_flight: fleet.inFlight(name) });
}

// What is wrong with a canary's settings, or ''.
function complaint(canary) {
    const names = fleet.read().map((replica) => replica.name).concat(fleet.TRITONS[1]);
    if (!canary || !Array.isArray(canary.replicas)) {
        return 'A canary is {"replicas": [NAME, …], "share": 0 to 1}.';
    }
    if (typeof canary.share !== 'number' || canary.share < 0 || canary.share > 1) {
        return `"share" is ${JSON.stringify(canary.share)}, and must be a number from 0 to 1.`;
    }
    const unknown = canary.replicas.filter((name) => !names.includes(name));
    return unknown.length ? `There is no replica ${unknown.join(', ')}.` : '';
}

async function canary(r) {
    if (r.method === 'PUT') {
        let wanted = null;
        try {
            wanted = JSON.parse(await r.readRequestText());
        } catch (e) {
            // not JSON: complaint() says what it has to be
        }
        const wrong = complaint(wanted);
        if (wrong) {
            answers.send(r, 400, 'bad_canary', wrong);
            return;
        }
        if (!fleet.set('canary', { replicas: wanted.replicas, share: wanted.share })) {
            noRoom(r);
            return;
        }
        fleet.publish();
    } else if (r.method === 'DELETE') {
        shared.delete('canary');
        fleet.publish();
    }
    answers.json(r, fleet.get('canary', { replicas: [], share: 0 }));
}

async function handle(r) {
    const [, name] = /^\/replicas\/([^/]+)\/drain$/.exec(r.uri) || [];
    if (r.uri === '/replicas' && r.method === 'GET') {
        answers.json(r, fleet.table().replicas.map((replica) => Object.assign(
            { in_flight: fleet.inFlight(replica.name) }, replica)));
    } else if (name && (r.method === 'PUT' || r.method === 'DELETE')) {
        drain(r, name);
    } else if (r.uri === '/canary' && ['GET', 'PUT', 'DELETE'].includes(r.method)) {
        await canary(r);
    } else {
        answers.notFound(r);
    }
}

export default { handle };
