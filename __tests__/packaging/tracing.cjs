const { traceSessions } = require('express-knex-session/opentelemetry');

traceSessions()();
console.log(JSON.stringify(Object.keys(require('express-knex-session').sessionChannels).length > 0 ? ['transaction'] : []));
