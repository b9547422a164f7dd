// The replicas that the autoscaler has taken out of the route, to be stopped.

import fs from 'fs';
import settings from './settings.js';

const PARKED_MS = 120000;   // the autoscaler's word counts for so long

// Their names, from its file, which it writes anew every few seconds. When it does so no more, whatever still runs is put back.
function names() {
    const file = `${settings.autoscaler}/stopped.json`;
    try {
        const fresh = Date.now() - fs.statSync(file).mtimeMs < PARKED_MS;
        return fresh ? JSON.parse(fs.readFileSync(file, 'utf8')).filter((name) => typeof name === 'string') : [];
    } catch (e) {
        // there is no autoscaler
        return [];
    }
}

export default { names };
