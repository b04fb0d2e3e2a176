// Package journal keeps the connection table on disk: an append-only journal of what happens to connections, and
// snapshots that it starts from. It knows nothing of maps: it is told events, and given a walk over the table when it
// asks for one. README.md says what the files hold and why they are as they are.
//
// A daemon's use of it, in this order:
//
//	j, err := journal.Open(stateDir, journal.Options{Logger: log})
//	report, err := journal.Load(stateDir, journal.LoadOptions{}, restore) // after a reboot
//	for range j.Wanted() { j.Snapshot(ctx, walk) }                        // a task of its own; the first is wanted at once
//	j.Add(events)                                                         // never waits for the disk
//	j.Close(ctx)
//
// Nothing that goes wrong on the disk is an error of Add: it is told by Status and by the log, once per change, and
// mended by itself when the disk works again.
package journal
