import type { RequestHandler } from 'express';

// Without its types: they would claim `req.session` for every test of the project.
export const expressSession = require('express-session') as (options: object) => RequestHandler;
