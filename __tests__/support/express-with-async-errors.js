/*
 * Express 4 as the README asks for it: a rejected async handler reaches the error handlers. The core's tests, which are written for
 * Express 5, run on it as they are. (`express4` is the plain one.)
 */
// Only the cells of Express 4 install it.
require(/** @type {string} */ ('express-async-errors'));
module.exports = require('express4');
