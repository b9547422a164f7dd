// What keys of the role admin reach through the public port: the status, the metrics, and the admin interface; and what each
// holder may know of itself.

import interior from './admin.js';
import answers from './answers.js';
import keys from './keys.js';
import limits from './limits.js';
import usage from './usage.js';
import views from './views.js';

function status(r) {
    return keys.admins(r, views.status, true);
}

// Lets admins through: what comes in pieces only js_content can send.
function metrics(r) {
    return keys.admins(r, () => {}, false);
}

function admin(r) {
    return keys.admins(r, interior.handle, false);
}

// GET /v1/usage: the caller's own limits in force, and what it has used.
async function own(r) {
    if (r.method !== 'GET') {
        answers.method(r, 'GET');
        return;
    }
    const holder = await keys.admitted(r);
    if (!holder) {
        return;
    }
    answers.json(r, {
        object: 'usage', key: holder.name, role: holder.role, models: holder.models,
        limits: limits.show(holder, r.variables.end_user), tokens: usage.of(holder.name),
    });
}

export default { own, status, metrics, admin };
