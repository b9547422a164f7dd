// What keys of the role admin reach through the public port: the status, the metrics, and the admin interface.

import interior from './admin.js';
import gauges from './metrics.js';
import keys from './keys.js';
import views from './views.js';

function status(r) {
    return keys.admins(r, views.status, true);
}

function metrics(r) {
    return keys.admins(r, gauges.show, false);
}

function admin(r) {
    return keys.admins(r, interior.handle, false);
}

export default { status, metrics, admin };
